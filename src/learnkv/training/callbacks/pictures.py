"""Heat maps of budgets and marginal values by layer and head, and validation results by kept fraction."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure

from learnkv.training.callbacks.fence import FencedLogger
from learnkv.training.module import Distillation
from learnkv.training.validation import VALIDATION_KEEPS

Table = Sequence[Sequence[float]]
STUDENTS = {"heuristic": "heuristic", "learned": "deployed", "soft": "soft gates"}


class WandbTables(Callback):
    """Logs heat maps of budgets and marginal values and tables of validation results after every validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Distillation)
        if (logger := _wandb_logger(trainer)) is not None:
            logger.attempt(lambda logger: self._log(logger.experiment, trainer, pl_module))

    def _log(self, run: Any, trainer: Trainer, module: Distillation) -> None:
        budgets, marginal = module.budgets, module.marginal
        if budgets is None or marginal is None:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        rows = [
            [name, keep, metrics[f"val/{name}_kl@{keep:g}"]]
            for name in ("heuristic", "learned", "soft")
            for keep in VALIDATION_KEEPS
        ]
        shares = [
            [keep, layer, head, share]
            for keep, table in budgets.items()
            for layer, heads in enumerate(table)
            for head, share in enumerate(heads)
        ]
        budget_maps = {f"budget heat map/keep {keep:g}": budget_map(table, keep) for keep, table in budgets.items()}
        marginal_maps = {f"marginal value/keep {keep:g}": marginal_map(table, keep) for keep, table in marginal.items()}
        run.log(
            {
                "pareto": wandb.Table(columns=["policy", "keep", "kl"], data=rows),
                "budgets": wandb.Table(columns=["keep", "layer", "head", "kept"], data=shares),
                "validation": wandb.Image(by_keep(metrics)),
                **{name: wandb.Image(figure) for name, figure in (budget_maps | marginal_maps).items()},
            }
        )


def log_policy(trainer: Trainer, folder: Path) -> None:
    """Attach an exported policy to the run as an artifact, and end the run: the next training gets its own."""

    def log(logger: WandbLogger) -> None:
        run = logger.experiment
        artifact = wandb.Artifact(f"policy-{run.id}", type="policy")
        artifact.add_dir(str(folder))
        run.log_artifact(artifact)
        run.finish()

    if (logger := _wandb_logger(trainer)) is not None:
        logger.attempt(log)


def write_pictures(module: Distillation, output: Path) -> None:
    """Write the last validation's results: `validation.png`, and marginal values as `marginal.png` and a table."""
    if module.marginal is None:
        return
    with (output / "metrics.csv").open(newline="", encoding="utf-8") as table:
        validated = [row for row in csv.DictReader(table) if row.get(f"val/gap@{VALIDATION_KEEPS[0]:g}")]
    if validated:
        by_keep({key: float(value) for key, value in validated[-1].items() if value}).savefig(output / "validation.png")
    maps = module.marginal
    layers, heads = len(maps[VALIDATION_KEEPS[0]]), len(maps[VALIDATION_KEEPS[0]][0])
    figure = Figure(figsize=((2.2 + 0.3 * heads) * len(maps), 1.5 + 0.25 * layers), layout="constrained")
    for axis, (keep, values) in zip(figure.subplots(1, len(maps)), maps.items(), strict=True):
        _marginal(figure, axis, values, keep)
    figure.savefig(output / "marginal.png")
    with (output / "marginal.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "head", *(f"keep_{keep:g}" for keep in maps)])
        for layer in range(layers):
            for head in range(heads):
                writer.writerow([layer, head, *(f"{values[layer][head]:.6g}" for values in maps.values())])


def by_keep(metrics: Mapping[str, float]) -> Figure:
    """KL of the policy, its soft gates and its base policy, and the fraction of changed entries, by kept fraction."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    divergence, changed = figure.subplots(1, 2)
    for name, label in STUDENTS.items():
        values = [metrics[f"val/{name}_kl@{keep:g}"] for keep in VALIDATION_KEEPS]
        divergence.plot(VALIDATION_KEEPS, values, marker="o", linestyle="--" if name == "soft" else "-", label=label)
    divergence.set(xscale="log", yscale="log", xlabel="kept fraction", ylabel="KL to the full cache, nats per token")
    divergence.legend(frameon=False)
    changed.plot(VALIDATION_KEEPS, [metrics[f"val/changed@{keep:g}"] for keep in VALIDATION_KEEPS], marker="o")
    changed.set(xscale="log", ylim=(0, 1), xlabel="kept fraction", ylabel="kept entries that the heuristic evicts")
    for axis in (divergence, changed):
        axis.set_xticks(VALIDATION_KEEPS, [f"{keep:g}" for keep in VALIDATION_KEEPS])
        axis.set_xticks([], minor=True)
    return figure


def budget_map(shares: Table, keep: float) -> Figure:
    """Kept fraction of every kv head: layers downwards, heads across."""
    figure = _sized(shares)
    _heads(figure, figure.subplots(), shares, f"kept at {keep:g}", vmin=0.0, vmax=1.0, cmap="viridis")
    return figure


def marginal_map(values: Table, keep: float) -> Figure:
    """Value of one more entry of every kv head, in nats per token: layers downwards, heads across."""
    figure = _sized(values)
    _marginal(figure, figure.subplots(), values, keep)
    return figure


def _marginal(figure: Figure, axis: Any, values: Table, keep: float) -> None:
    most = max(abs(value) for row in values for value in row) or 1.0
    _heads(figure, axis, values, f"one more entry at {keep:g}", vmin=-most, vmax=most, cmap="RdBu")


def _heads(figure: Figure, axis: Any, values: Table, title: str, **colours: Any) -> None:
    image = axis.imshow(values, aspect="auto", **colours)
    axis.set(title=title, xlabel="kv head", ylabel="layer")
    figure.colorbar(image, ax=axis)


def _sized(values: Table) -> Figure:
    return Figure(figsize=(2 + 0.3 * len(values[0]), 1.5 + 0.25 * len(values)), layout="constrained")


def _wandb_logger(trainer: Trainer) -> FencedLogger | None:
    """The fenced W&B logger, on the process that has its run."""
    fenced = [logger for logger in trainer.loggers if isinstance(logger, FencedLogger)]
    return next((f for f in fenced if trainer.is_global_zero and isinstance(f.logger, WandbLogger)), None)
