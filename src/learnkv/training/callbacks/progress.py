"""A progress line."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLine(Callback):
    """Step, loss, spent over requested budget, throughput and remaining time; one line, updated in place in a terminal.

    Args:
        interval: seconds between lines without a terminal.
    """

    def __init__(self, interval: float = 10.0) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.interval = 0.5 if self.is_terminal else interval
        self.begun = self.printed_at = 0.0
        self.first = self.tokens = 0
        self.loss: float | None = None
        self.objective = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = self.printed_at = time.monotonic()
        self.first, self.tokens = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += batch.prompts.numel() * trainer.world_size
        if self.objective != pl_module.step_objective.name:  # the scale of the loss changes with the stage
            self.objective, self.loss = pl_module.step_objective.name, None
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        now = time.monotonic()
        done, steps = trainer.global_step, trainer.max_steps
        if now - self.printed_at < self.interval and done < steps:
            return
        if not trainer.is_global_zero or done == self.first:
            return
        self.printed_at = now
        line = self._line(trainer, now - self.begun)
        print(
            f"\r{line}" if self.is_terminal else line, end="" if self.is_terminal else "\n", file=sys.stderr, flush=True
        )

    def _line(self, trainer: Trainer, seconds: float) -> str:
        done, steps = trainer.global_step, trainer.max_steps
        left = seconds / (done - self.first) * (steps - done)
        spent = trainer.callback_metrics.get("train/spent_over_asked")
        ratio = "" if spent is None else f"spent/asked {float(spent):.3f}  "
        bar = "#" * round(20 * done / steps)
        name = "KL" if self.objective == "kl" else self.objective
        return (
            f"step {done}/{steps} [{bar:<20}] {name} {self.loss:.4f}  {ratio}"
            f"{self.tokens / seconds:,.0f} prompt tokens/s  {left / 60:.1f} min left"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_terminal and trainer.is_global_zero:
            print(file=sys.stderr)
