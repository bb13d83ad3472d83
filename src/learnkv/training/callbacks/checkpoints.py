"""Checkpoints, replaced atomically, and the end of a run on SIGTERM or, in a SLURM job, SIGUSR1."""

import signal
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from learnkv.errors import Preempted, RunError
from learnkv.formats import seal
from learnkv.formats.files import output_file
from learnkv.training import slurm


class Checkpoints(Callback):
    """Writes `last.ckpt` at intervals, at the end of the training and on SIGTERM (SLURM: SIGUSR1).

    It replaces the previous checkpoint atomically: on a full disk that one survives. SIGTERM to one of several
    processes ends all of them after the current step.

    Args:
        folder: folder of the checkpoint.
        save_steps: steps between checkpoints.
        save_minutes: longest time between checkpoints.
        validation_steps: steps between validations, whose results belong to the checkpoint of that step.

    Raises:
        Preempted: after the signal, once the checkpoint is written.
    """

    def __init__(self, folder: Path, save_steps: int, save_minutes: float, validation_steps: int) -> None:
        self.file = folder / "last.ckpt"
        self.save_steps, self.save_minutes, self.validation_steps = save_steps, save_minutes, validation_steps
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.last_step = -1
        self.terminated = self.ends = False
        self.signal = signal.SIGTERM

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Convert batch counts to this run's batches per step, which may differ from the checkpoint's."""
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        more = checkpoint["global_step"] * trainer.accumulate_grad_batches - progress["total"]["ready"]
        for counts in (progress["total"], progress["current"]):
            counts.update({key: count + more for key, count in counts.items()})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = self.last_step = trainer.global_step
        self.saved_at = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            # Replaces Lightning's handler, which communicates with the other processes in the middle of a step.
            # Lightning restores the original handler at the end.
            for number in slurm.end_signals():
                signal.signal(number, self._note)

    def _note(self, number: int, *_: Any) -> None:
        self.terminated, self.signal = True, signal.Signals(number)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.ends:  # here, as the last step has been logged by now
            requeues = self.signal == signal.SIGUSR1 and trainer.is_global_zero
            then = slurm.requeue() if requeues else "the same command resumes it"
            raise Preempted(f"ended by {self.signal.name} after step {trainer.global_step}; {then}")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        # Not in the middle of an accumulated step: a resumed run begins a step.
        if trainer.global_step == self.last_step:
            return
        self.last_step = trainer.global_step
        if trainer.global_step % self.validation_steps:
            self._after_step(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:  # else it is the end of the training
            self._after_step(trainer)

    def _after_step(self, trainer: Trainer) -> None:
        overdue = time.monotonic() - self.saved_at > 60 * self.save_minutes
        self.ends = trainer.strategy.reduce_boolean_decision(self.terminated, all=False)
        if self.ends or trainer.global_step % self.save_steps == 0 or trainer.strategy.broadcast(overdue):
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        writes = trainer.is_global_zero  # the other processes take part in collecting the state
        try:
            with output_file(self.file) if writes else nullcontext(self.file) as path:
                trainer.save_checkpoint(path)
                if writes:
                    seal.seal(path)
        except (OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "write" not in str(error):
                raise
            raise RunError(
                f"no space left on disk for {self.file}; "
                + (f"the checkpoint of step {self.saved_step} is kept" if self.file.exists() else "nothing was saved")
            ) from None
        self.saved_step, self.saved_at = trainer.global_step, time.monotonic()
