"""`RunFolder`: the folder of a run, and the rules for resuming it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from learnkv.errors import UserError
from learnkv.formats.files import make_folder, read_yaml
from learnkv.persistence.stored_policy import load_checkpoint
from learnkv.training.config import TrainConfig, default_keys
from learnkv.training.run_contents import contents_of
from learnkv.training.start import check_outside

MAY_CHANGE = ("trainer", "wandb", "workers", "save_every", "save_minutes", "output", "overwrite", "answers")
"""Keys that may differ when a run is resumed."""


@dataclass(frozen=True)
class RunFolder:
    """Folder of a run, with what its checkpoint was trained for."""

    path: Path
    step: int = 0
    """Optimiser steps of the checkpoint; 0 without one."""
    model: Mapping[str, Any] | None = None
    """Description of the checkpoint's model; None without a checkpoint."""
    contents: Mapping[str, Any] = field(default_factory=dict)
    """Hashes of the files that the run reads (`contents_of`)."""

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
        """Raise UserError for a checkpoint that was trained for another model; where it lies does not matter."""
        expected = {key: value for key, value in (self.model or {}).items() if key != "id"}
        if any(model.get(key) != value for key, value in expected.items()):
            raise UserError(
                f"output={self.path}: has a run for {self.model}, the model is {model}; overwrite=true starts anew"
            )


def open_run(config: TrainConfig, keys: Mapping[str, Any]) -> RunFolder:
    """Create the folder of a run, or open it to resume its checkpoint.

    Args:
        keys: all keys of the run as plain containers.

    Raises:
        UserError: the folder has a run with other keys, an evaluation, or a checkpoint that cannot be read, or cannot
            be written.
    """
    run = RunFolder(Path(config.output).expanduser(), contents=contents_of(keys))
    check_outside(config.start, run.path)
    if config.overwrite:
        _remove_checkpoints(run)
    make_folder(run.path, "output")
    make_folder(run.checkpoint.parent, "output")
    if not run.checkpoint.is_file():
        _check_no_evaluation(run.path, config.overwrite)
        return run
    try:
        checkpoint = load_checkpoint(run.checkpoint)
        step, stored = checkpoint["global_step"], checkpoint["learnkv"]
        model = stored["model"]
    except (UserError, KeyError) as error:
        raise UserError(f"output={run.path}: cannot be continued ({error}); overwrite=true starts anew") from None
    _check_keys(run, keys, stored.get("contents", {}))
    return RunFolder(run.path, step, model, run.contents)


def _remove_checkpoints(run: RunFolder) -> None:
    """Remove what a new run could be resumed from, Lightning's requeue checkpoints included."""
    for file in (run.checkpoint, *run.checkpoint.parent.glob("hpc_ckpt_*.ckpt")):
        try:
            file.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"output={run.path}: {file} cannot be removed: {error.strerror}") from None


def _check_no_evaluation(folder: Path, overwrite: bool) -> None:
    """Raise UserError for a folder with the config of an evaluation, which a run's would replace."""
    file = folder / "config.yaml"
    if not overwrite and file.is_file() and "trainer" not in (read_yaml(file) or {}):
        raise UserError(f"output={folder}: has the config.yaml of an evaluation; expected another output=")


def _check_keys(run: RunFolder, keys: Mapping[str, Any], contents: Mapping[str, Any]) -> None:
    stored = run.path / "config.yaml"
    if not stored.is_file():
        raise UserError(f"output={run.path}: has a checkpoint without its config.yaml; overwrite=true starts anew")
    old = {**(read_yaml(stored) or {}), **contents}
    new = {**keys, **{key: run.contents[key] for key in contents if key in run.contents}}
    if changed := changed_keys(old, new):
        raise UserError(
            f"output={run.path}: has a run with another {', '.join(changed)}; expected the same settings, another "
            "output=, or overwrite=true"
        )


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys in which two runs differ and must not; a key that the older run does not have counts as its default."""
    defaults = default_keys()
    return [key for key in new if key not in MAY_CHANGE and old.get(key, defaults.get(key)) != new[key]]
