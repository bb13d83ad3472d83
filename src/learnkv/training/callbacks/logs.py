"""Metrics of a run as a table that survives interruptions."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CsvTable(Logger):
    """`metrics.csv`: a row per logged step, a column per metric.

    A run that continues keeps the rows up to the step it continues from.

    Args:
        file: where the table is.
        resumed_at: step that the run continues from; 0: a new run.
    """

    def __init__(self, file: Path, resumed_at: int = 0) -> None:
        super().__init__()
        self.file = file
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
        """Nothing: the run's `config.yaml` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        shown = {key: f"{value:.6g}" for key, value in metrics.items() if key != "epoch"}
        if not shown:
            return
        if not self.rows or int(self.rows[-1]["step"]) != step:
            self.rows.append({"step": step})
        self.rows[-1].update(shown)
        self.columns += [key for key in shown if key not in self.columns]

    @rank_zero_only
    def save(self) -> None:
        """Replace the file by the table as it is now."""
        part = self.file.with_name(self.file.name + ".part")
        with part.open("w", newline="", encoding="utf-8") as table:
            writer = csv.DictWriter(table, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        part.replace(self.file)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()
