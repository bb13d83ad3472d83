"""`python -m learnkv.export --ckpt PATH --out DIR`: a checkpoint's policy as a folder that others can load."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from learnkv.config import run_main
from learnkv.errors import UserError
from learnkv.io import load_policy, save_policy


@dataclass(frozen=True)
class ExportConfig:
    """Export the policy of a training checkpoint.

    Args:
        ckpt: checkpoint of `train.py`.
        out: folder to write: `policy.yaml`, `policy.safetensors`, `budgets.csv`, `manifest.json`.
        allow: module prefixes besides learnkv whose classes the checkpoint may name.
    """

    ckpt: str = ""
    out: str = ""
    allow: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("ckpt", "out"):
            if not getattr(self, key):
                raise UserError(f"{key}=: expected a path, got nothing")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; gives the exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    return run_main(export, words or ["ckpt="], "export")


def export(config: ExportConfig, resolved: str) -> None:
    """Write the folder and say what it holds."""
    if Path(config.ckpt).suffix != ".ckpt":
        raise UserError(f"ckpt={config.ckpt}: expected a checkpoint (.ckpt) of train.py")
    policy = load_policy(config.ckpt, config.allow)
    held = torch.load(Path(config.ckpt).expanduser(), map_location="cpu", weights_only=True)["learnkv"]
    try:
        folder = save_policy(
            policy, config.out, model=held["model"], budgets=held.get("budgets"), training=held.get("training")
        )
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"out={config.out}: expected a folder that can be written ({error})") from None
    print(f"policy: {folder}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
