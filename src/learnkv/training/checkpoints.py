"""Checkpoints that replace each other only when they are complete."""

import errno
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from learnkv.errors import RunError


class Checkpoints(Callback):
    """Writes `last.ckpt` every so many steps or minutes and at the end of the training.

    It is written beside the previous one and then takes its place: on a full disk the previous one survives.

    Args:
        folder: of the checkpoint.
        every: steps between checkpoints.
        minutes: longest time between checkpoints.
    """

    def __init__(self, folder: Path, every: int, minutes: float) -> None:
        self.file = folder / "last.ckpt"
        self.every, self.minutes = every, minutes
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.last_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = self.last_step = trainer.global_step
        self.saved_at = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # In the middle of an accumulated step nothing is saved: a resumed run begins a step.
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        overdue = time.monotonic() - self.saved_at > 60 * self.minutes
        if trainer.global_step % self.every == 0 or trainer.strategy.broadcast(overdue):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        part = self.file.with_name(self.file.name + ".part")
        try:
            trainer.save_checkpoint(part)
            if trainer.is_global_zero:
                os.replace(part, self.file)
        except (OSError, RuntimeError) as error:
            part.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            if isinstance(error, RuntimeError) and "write" not in str(error):
                raise
            raise RunError(
                f"no space left on disk for {self.file}; "
                + (f"the checkpoint of step {self.saved_step} is kept" if self.file.exists() else "nothing was saved")
            ) from None
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
