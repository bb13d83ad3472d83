"""`RunFolder`: the folder of a run, and the rules for resuming it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from learnkv.errors import UserError
from learnkv.formats.files import make_folder, read_text
from learnkv.persistence.stored_policy import load_checkpoint
from learnkv.training.config import TrainConfig, default_keys

MAY_CHANGE = ("trainer", "wandb", "workers", "save_every", "save_minutes", "overwrite", "answers")
"""Keys that may differ when a run is resumed."""


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, with what its checkpoint was trained for."""

    path: Path
    step: int = 0
    """Optimiser steps of the checkpoint; 0 without one."""
    model: Mapping[str, Any] | None = None
    """Description of the checkpoint's model; None without a checkpoint."""

    @property
    def resumes(self) -> bool:
        """Whether there is a checkpoint to resume."""
        return self.model is not None

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    @property
    def policy(self) -> Path:
        """Folder of the exported policy."""
        return self.path / "policy"

    def is_finished(self, steps: int) -> bool:
        """Whether the run has its policy and all of its steps."""
        return self.step >= steps and (self.policy / "manifest.json").is_file()

    def check_model(self, model: Mapping[str, Any]) -> None:
        """Raise UserError where the checkpoint was trained for another model."""
        if self.model is not None and any(model.get(key) != value for key, value in self.model.items()):
            raise UserError(
                f"output={self.path}: has a run for {self.model}, the model is {model}; overwrite=true starts anew"
            )


def open_run(config: TrainConfig, keys: Mapping[str, Any]) -> RunFolder:
    """Create the folder of a run, or open it to resume its checkpoint.

    Args:
        keys: all keys of the run as plain containers.

    Raises:
        UserError: the folder has a run with other keys, or a checkpoint that cannot be read, or cannot be written.
    """
    run = RunFolder(Path(config.output).expanduser())
    if config.overwrite:
        run.checkpoint.unlink(missing_ok=True)
    resumes = run.checkpoint.is_file()
    if resumes:
        _check_keys(run.path, keys)
    make_folder(run.path, "output")
    make_folder(run.checkpoint.parent, "output")
    if not resumes:
        return run
    try:
        checkpoint = load_checkpoint(run.checkpoint)
        return RunFolder(run.path, checkpoint["global_step"], checkpoint["learnkv"]["model"])
    except (UserError, KeyError) as error:
        raise UserError(f"output={run.path}: cannot be continued ({error}); overwrite=true starts anew") from None


def _check_keys(folder: Path, keys: Mapping[str, Any]) -> None:
    stored = folder / "config.yaml"
    if not stored.is_file():
        raise UserError(f"output={folder}: has a checkpoint without its config.yaml; overwrite=true starts anew")
    if changed := changed_keys(yaml.safe_load(read_text(stored)), keys):
        raise UserError(
            f"output={folder}: has a run with another {', '.join(changed)}; expected the same settings, another "
            "output=, or overwrite=true"
        )


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two runs differ and must not; a key that the older run does not have counts as its default."""
    defaults = default_keys()
    return [key for key in new if key not in MAY_CHANGE and old.get(key, defaults.get(key)) != new[key]]
