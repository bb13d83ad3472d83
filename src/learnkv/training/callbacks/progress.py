"""One line that says how a training is going."""

import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class ProgressLine(Callback):
    """Step, loss, spent over asked budget, throughput and time to go; rewritten in a terminal, repeated elsewhere.

    Args:
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, every: float = 10.0) -> None:
        self.every = every
        self.live = sys.stderr.isatty()
        self.begun = self.told = 0.0
        self.first = self.tokens = 0
        self.loss: float | None = None
        self.of = ""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.begun = self.told = time.monotonic()
        self.first, self.tokens = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += batch.prompts.numel() * trainer.world_size
        if self.of != pl_module.asked.name:  # another stage, another scale
            self.of, self.loss = pl_module.asked.name, None
        loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
        self.loss = loss if self.loss is None else 0.95 * self.loss + 0.05 * loss
        now = time.monotonic()
        done, steps = trainer.global_step, trainer.max_steps
        if now - self.told < (0.5 if self.live else self.every) and done < steps:
            return
        if not trainer.is_global_zero or done == self.first:
            return
        self.told = now
        speed = self.tokens / (now - self.begun)
        left = (now - self.begun) / (done - self.first) * (steps - done)
        spent = trainer.callback_metrics.get("train/spent_over_asked")
        told = "" if spent is None else f"spent/asked {float(spent):.3f}  "
        bar = "#" * round(20 * done / steps)
        name = "KL" if self.of == "kl" else self.of
        line = (
            f"step {done}/{steps} [{bar:<20}] {name} {self.loss:.4f}  {told}"
            f"{speed:,.0f} prompt tokens/s  {left / 60:.1f} min left"
        )
        print(f"\r{line}" if self.live else line, end="" if self.live else "\n", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.live and trainer.is_global_zero:
            print(file=sys.stderr)
