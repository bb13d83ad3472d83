"""What results come from: the code's commit and the chat template; of tasks their version, code and prompts."""

import hashlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from learnkv.evaluation.sources import PACKAGE

DIGITS = 16
UNKNOWN = "unknown"


def commit() -> str:
    """The commit of the checkout that the package is in, and whether its files were changed since; else `UNKNOWN`."""
    package = Path(sys.modules[PACKAGE].__path__[0]).resolve()
    root = _git(package, "rev-parse", "--show-toplevel")
    if root is None or Path(root).resolve() / "src" / PACKAGE != package:
        return UNKNOWN
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return f"{_git(package, 'rev-parse', 'HEAD')}{' with changes' if changes else ''}"


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def template_hash(tokenizer: Any) -> str:
    """Hash of a tokenizer's chat template."""
    template = tokenizer.chat_template
    return "none" if template is None else digest_of(repr(template))


def digest_of(text: str) -> str:
    """The first digits of a text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def tasks_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Keys of a row about its task: what measured it, its prompts, and of how many rows these were drawn.

    None where the samples are older than these keys; `n_original` also where prompts are made, without end.
    """
    first = records[0]
    prompts = sorted(record.get("prompt_hash") or "" for record in records)
    return {
        "n_original": first.get("n_original"),
        "task_version": first.get("task_version"),
        "task_hash": first.get("task_hash"),
        "prompts_hash": digest_of(" ".join(prompts)) if all(prompts) else None,
    }
