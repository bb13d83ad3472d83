"""Learning rates and the norm of the gradient as metrics."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class OptimiserMetrics(Callback):
    """Logs the gradient's norm before clipping and the learning rates.

    They are `train/grad_norm`, `train/lr`, `train/budget_lr` and `train/lora_lr`.
    """

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        gradients = [weight.grad for weight in pl_module.trained if weight.grad is not None]
        pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients), on_step=True, on_epoch=False)
        for name, group in zip(pl_module.rate_names, optimizer.param_groups, strict=True):
            pl_module.log(f"train/{name}", float(group["lr"]), on_step=True, on_epoch=False)
