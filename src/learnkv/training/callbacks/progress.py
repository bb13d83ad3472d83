"""A progress line."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from learnkv.training.callbacks.logs import TIMING


class ProgressLine(Callback):
    """Step, loss, spent over requested budget, throughput and remaining time; one line, updated in place in a terminal.

    The loss has the name and the value of the metric. Logs `time/step_seconds` and `time/prompt_tokens_per_second`.

    Args:
        interval: seconds between lines without a terminal.
    """

    def __init__(self, interval: float = 10.0) -> None:
        self.is_terminal = sys.stderr.isatty()
        self.interval = 0.5 if self.is_terminal else interval
        self.begun = self.printed_at = 0.0
        self.first = self.tokens = 0
        self.step_begun, self.step_tokens, self.last_step = 0.0, 0, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = self.printed_at = self.step_begun = time.monotonic()
        self.first = self.last_step = trainer.global_step
        self.tokens = self.step_tokens = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += batch.prompts.numel() * trainer.world_size
        now = time.monotonic()
        self._log_times(trainer, pl_module, now)
        done, steps = trainer.global_step, trainer.max_steps
        if now - self.printed_at < self.interval and done < steps:
            return
        if not trainer.is_global_zero or done == self.first:
            return
        self.printed_at = now
        line = self._line(trainer, pl_module.logged_loss, now - self.begun)
        print(
            f"\r{line}" if self.is_terminal else line, end="" if self.is_terminal else "\n", file=sys.stderr, flush=True
        )

    def _log_times(self, trainer: Trainer, pl_module: LightningModule, now: float) -> None:
        """Log the times of an optimiser step at its last batch."""
        if trainer.global_step == self.last_step:
            return
        seconds, tokens = now - self.step_begun, self.tokens - self.step_tokens
        self.step_begun, self.step_tokens, self.last_step = now, self.tokens, trainer.global_step
        times = {"step_seconds": seconds, "prompt_tokens_per_second": tokens / max(seconds, 1e-9)}
        pl_module.log_dict({f"{TIMING}{name}": value for name, value in times.items()}, on_step=True, on_epoch=False)

    def _line(self, trainer: Trainer, loss: str, seconds: float) -> str:
        done, steps = trainer.global_step, trainer.max_steps
        per_step = seconds / (done - self.first)
        left = per_step * (steps - done)
        spent = trainer.callback_metrics.get("train/spent_over_asked")
        ratio = "" if spent is None else f"train/spent_over_asked {float(spent):.3f}  "
        bar = "#" * round(20 * done / steps)
        return (
            f"step {done}/{steps} [{bar:<20}] {loss} {float(trainer.callback_metrics[loss]):.4f}  {ratio}"
            f"{per_step:.2f} s/step  {self.tokens / seconds:,.0f} prompt tokens/s  {left / 60:.1f} min left"
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.is_terminal and trainer.is_global_zero:
            print(file=sys.stderr)
