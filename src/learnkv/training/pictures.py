"""What Weights & Biases is shown beside curves: budgets by layer and head, KL by kept fraction, the exported policy."""

from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from learnkv.training.module import VALIDATION_KEEPS, Distillation


class WandbTables(Callback):
    """After every validation: heat maps of the budgets, and a table of the KL of the policy and of its heuristic."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distillation)
        run, budgets = _run(trainer), pl_module.budgets
        if run is None or budgets is None:
            return
        measured = trainer.callback_metrics
        rows = [
            [name, keep, float(measured[f"val/{name}_kl@{keep:g}"])]
            for name in ("heuristic", "learned")
            for keep in VALIDATION_KEEPS
        ]
        shares = [
            [keep, layer, head, share]
            for keep, table in budgets.items()
            for layer, heads in enumerate(table)
            for head, share in enumerate(heads)
        ]
        run.log(
            {
                "pareto": wandb.Table(columns=["policy", "keep", "kl"], data=rows),
                "budgets": wandb.Table(columns=["keep", "layer", "head", "kept"], data=shares),
                **{f"budget heat map/keep {keep:g}": wandb.Image(heat_map(budgets[keep], keep)) for keep in budgets},
            }
        )


def log_policy(trainer: Trainer, folder: Path) -> None:
    """Attach an exported policy to the run as an artifact."""
    run = _run(trainer)
    if run is not None:
        artifact = wandb.Artifact(f"policy-{run.id}", type="policy")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)


def heat_map(shares: list[list[float]], keep: float) -> Figure:
    """Kept fraction of every kv head: layers downwards, heads across."""
    layers, heads = len(shares), len(shares[0])
    figure = Figure(figsize=(2 + 0.3 * heads, 1.5 + 0.25 * layers), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(shares, aspect="auto", vmin=0.0, vmax=1.0, cmap="viridis")
    axis.set(title=f"kept at {keep:g}", xlabel="kv head", ylabel="layer")
    figure.colorbar(image, ax=axis)
    return figure


def _run(trainer: Trainer) -> Any:
    """The run on W&B, on the one process that has it."""
    if not trainer.is_global_zero:
        return None
    return next((logger.experiment for logger in trainer.loggers if isinstance(logger, WandbLogger)), None)
