"""Metrics of a run as a CSV file."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from learnkv.formats.files import atomic_write

TIMING = "time/"


def is_timing(key: str) -> bool:
    """Whether a metric is a time or a rate, which differs between equal runs."""
    return key.startswith(TIMING)


class CsvTable(Logger):
    """`metrics.csv`: a row per logged step, a column per metric.

    A resumed run keeps the rows before the step that it resumes from.

    Args:
        file: path of the table.
        resumed_at: step that the run resumes from; 0: a new run.
        timing: whether it has the metrics of time, which differ between equal runs, or all others.
    """

    def __init__(self, file: Path, resumed_at: int = 0, timing: bool = False) -> None:
        super().__init__()
        self.file, self.timing = file, timing
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        if resumed_at and file.is_file():
            with file.open(newline="", encoding="utf-8") as table:
                self.rows = [row for row in csv.DictReader(table) if int(row["step"]) < resumed_at]
            self.columns = list(dict.fromkeys(["step", *(key for row in self.rows for key in row)]))

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's `config.yaml` has them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        wanted = {key: value for key, value in metrics.items() if is_timing(key) == self.timing and key != "epoch"}
        values = {key: f"{value:.6g}" for key, value in wanted.items()}
        if not values:
            return
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        self.rows[-1].update(values)
        self.columns += [key for key in values if key not in self.columns]

    @rank_zero_only
    def save(self) -> None:
        """Write the table."""
        if self.timing and not self.rows:
            return
        with atomic_write(self.file) as part, part.open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()


class LastStep(Callback):
    """Logs the last step of a run, which the console and the model card show, whatever `log_every_n_steps` is."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step < trainer.max_steps:
            return
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        of_steps = {key: value for key, value in metrics.items() if key.startswith(("train/", TIMING))}
        for logger in trainer.loggers:
            logger.log_metrics(of_steps, trainer.global_step - 1)
