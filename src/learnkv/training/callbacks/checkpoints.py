"""Checkpoints that replace each other only when they are complete."""

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from learnkv.errors import Preempted, RunError


class Checkpoints(Callback):
    """Writes `last.ckpt` every so many steps or minutes, and at the end of the training or when it is asked to end.

    It is written beside the previous one and then takes its place: on a full disk the previous one survives. SIGTERM to
    one of several processes ends all of them after the step that is being made.

    Args:
        folder: of the checkpoint.
        every: steps between checkpoints.
        minutes: longest time between checkpoints.
        validates: steps between validations, whose results belong to the checkpoint of that step.

    Raises:
        Preempted: after SIGTERM, once the checkpoint is written.
    """

    def __init__(self, folder: Path, every: int, minutes: float, validates: int) -> None:
        self.file = folder / "last.ckpt"
        self.every, self.minutes, self.validates = every, minutes, validates
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.last_step = -1
        self.asked_to_end = self.ends = False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Count batches as this run does, whose steps may be made of more or fewer of them than those that are done."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        more = checkpoint["global_step"] * trainer.accumulate_grad_batches - progress["total"]["ready"]
        for counts in (progress["total"], progress["current"]):
            counts.update({key: count + more for key, count in counts.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = self.last_step = trainer.global_step
        self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # In the place of Lightning's, which talks to the other processes in the midst of whatever they say. It puts
            # back at the end what was there before both.
            signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked_to_end = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.ends:  # and not before: what the last step found has been logged by now
            raise Preempted(f"ended by SIGTERM after step {trainer.global_step}; the same command goes on from there")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # In the middle of an accumulated step nothing is saved: a resumed run begins a step.
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        if trainer.global_step % self.validates:
            self._after_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:  # else it is the end of the training
            self._after_step(trainer)

    def _after_step(self, trainer: Trainer) -> None:
        overdue = time.monotonic() - self.saved_at > 60 * self.minutes
        self.ends = trainer.strategy.reduce_boolean_decision(self.asked_to_end, all=False)
        if self.ends or trainer.global_step % self.every == 0 or trainer.strategy.broadcast(overdue):
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
