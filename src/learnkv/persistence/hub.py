"""Trained policies on the Hugging Face hub: their files go there and come from there, and nothing else does."""

import re
from pathlib import Path

from learnkv.errors import UserError

FILES = (
    "policy.yaml",
    "policy.safetensors",
    "budgets.csv",
    "manifest.json",
    "README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)
"""What is sent and fetched: text and safetensors, never code."""


def names_a_repository(path: str) -> bool:
    """Whether `path` means `owner/name` or `owner/name@revision` on the hub.

    What would lie in a folder that exists here is a mistyped path: no network is asked about it.
    """
    fits = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", path) is not None
    return fits and not path.endswith((".ckpt", ".yaml", ".yml")) and not Path(path).parent.exists()


def fetch(name: str) -> Path:
    """The folder of a policy that is called `owner/name` or `owner/name@revision` on the hub, fetched once.

    Raises:
        UserError: no such repository or revision, no network, or none of our files in it.
    """
    from huggingface_hub import snapshot_download

    repo_id, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:
        raise UserError(
            f"ckpt={name}: no such file or folder, and the hub has no such policy ({_why(error)})"
        ) from None
    if not (folder / "policy.yaml").is_file():
        raise UserError(f"ckpt={name}: expected the repository of an exported policy, it has no policy.yaml")
    return folder


def push(folder: Path, repo_id: str) -> str:
    """Send a policy's files to the hub, into a repository that is made where there is none; gives its address.

    Raises:
        UserError: no network, not logged in, not allowed, or no valid name.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(FILES), commit_message="KV-cache policy of learnkv"
        )
    except (OSError, ValueError) as error:
        raise UserError(f"push={repo_id}: {_why(error)}") from None
    return repo_id


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
