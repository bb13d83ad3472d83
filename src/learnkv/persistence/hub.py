"""Upload and download of trained policies on the Hugging Face hub."""

import re
from pathlib import Path

from learnkv.errors import UserError
from learnkv.formats.hub_network import hub_fault
from learnkv.persistence import custom_generate

FILES = (
    "policy.yaml",
    "policy.safetensors",
    "budgets.csv",
    "manifest.json",
    "README.md",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
)
"""Files that are downloaded: text and safetensors, never code."""


def is_repository(path: str) -> bool:
    """Whether `path` is `owner/name` or `owner/name@revision` on the hub.

    A path in an existing local folder is a mistyped file name: it is not looked up on the network.
    """
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@\w[\w./-]*)?", path) is not None
    return is_name and not path.endswith((".ckpt", ".yaml", ".yml")) and not Path(path).parent.exists()


def fetch(name: str) -> Path:
    """Local folder of the policy `owner/name` or `owner/name@revision`, downloaded once.

    Raises:
        UserError: no such repository or revision, no network, or no policy in it.
    """
    from huggingface_hub import snapshot_download

    repo_id, _, given = name.partition("@")
    fault = hub_fault()
    try:
        revision, local_only = given or None, fault is not None
        folder = Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES), local_files_only=local_only)
        )
    except (OSError, ValueError) as error:
        reason = fault or _first_line(error)
        raise UserError(f"ckpt={name}: no such file or folder, and the hub has no such policy ({reason})") from None
    if not (folder / "policy.yaml").is_file():
        raise UserError(f"ckpt={name}: expected the repository of an exported policy, it has no policy.yaml")
    return folder


def push(folder: Path, repo_id: str) -> str:
    """Upload a policy's files to the hub; the repository is created where it is missing. Returns `repo_id`.

    The code for transformers' `custom_generate` is among them where it is what learnkv writes.

    Raises:
        UserError: no network, no login, no permission, or an invalid name.
    """
    from huggingface_hub import HfApi

    names = [*FILES, *custom_generate.unchanged(folder)]
    try:
        api = HfApi()
        api.create_repo(repo_id, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=names, commit_message="KV-cache policy of learnkv"
        )
    except (OSError, ValueError) as error:
        raise UserError(f"push={repo_id}: {_first_line(error)}") from None
    return repo_id


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
