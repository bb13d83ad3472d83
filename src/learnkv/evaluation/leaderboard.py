"""`leaderboard.csv`: rows in the layout of kvpress's leaderboard, then columns of ours."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

from learnkv.data.ruler import TASKS
from learnkv.evaluation.panels import Row, mean, panel_of, score_of
from learnkv.evaluation.results import FULL, budget_of, kind_of
from learnkv.evaluation.tasks.suites import SUITES

QUANTILE = 1.959964
"""Of the normal distribution, for intervals of 95 %."""
PER_TASK = ("longbench",)
"""Data sets whose tasks are folders of their own there; the tasks of others share one, and a mean."""


def leaderboard(model: str, environment: dict[str, str], rows: Iterable[Row]) -> list[dict[str, Any]]:
    """A row per data set (of LongBench per task), length, setting, method and budget.

    `compression_ratio` is the fraction of entries that is evicted: as asked for, with a budget in bytes as measured.
    Text is left out, as it has no score.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if kind_of(row) != "text":
            where = dataset_of(row["task"], row["length"])
            groups.setdefault((*where, panel_of(row), row["policy"], budget_of(row)), []).append(row)
    return [_row(model, environment, dataset, folder, group) for (dataset, folder, *_), group in groups.items()]


def text_of(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as CSV."""
    listed = list(rows)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(listed[0]) if listed else ["dataset"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(listed)
    return file.getvalue()


def dataset_of(task: str, length: int) -> tuple[str, str]:
    """Data set and folder of a task; a table's tasks are data sets of their own."""
    if task in TASKS:
        return "ruler", str(length)
    suite = next((suite for suite in SUITES.values() if task in suite.tasks), None)
    if suite is None:
        return task, str(length)
    return suite.name, task.removeprefix(f"{suite.name}_") if suite.name in PER_TASK else str(length)


def _row(model: str, environment: dict[str, str], dataset: str, folder: str, group: list[Row]) -> dict[str, Any]:
    first, score = group[0], score_of(group)
    kept = 1.0 if first["policy"] == FULL else mean(group, "spent" if first["keep"] is None else "keep")
    half = QUANTILE * score.stderr
    known = score.stderr == score.stderr
    return {
        "dataset": dataset,
        "data_dir": folder,
        "model": model,
        "method": first["policy"],
        "compression_ratio": round(1 - kept, 6),
        "score": round(score.mean, 4),
        "score_full": round(mean(group, "score_full"), 4),
        "ci_low": round(score.mean - half, 4) if known else None,
        "ci_high": round(score.mean + half, 4) if known else None,
        "bytes": round(mean(group, "bytes")),
        "bytes_full": round(mean(group, "bytes_full")),
        "entries_kept": round(mean(group, "spent"), 6),
        "bytes_budget": first["bytes_budget"],
        "precision": first["precision"],
        "setting": first["setting"],
        "metric": kind_of(first),
        "length": first["length"],
        "tasks": " ".join(row["task"] for row in group),
        "n": score.n,
        "n_original": _total(row.get("n_original") for row in group),
        "task_version": " ".join(dict.fromkeys(str(row.get("task_version") or "") for row in group)),
        "prompts_hash": " ".join(row.get("prompts_hash") or "" for row in group),
        "chat_template": environment.get("chat_template"),
        "commit": environment.get("commit"),
    }


def _total(counts: Iterator[int | None]) -> int | None:
    """Their sum; None where one is unknown."""
    listed = list(counts)
    known = [count for count in listed if count is not None]
    return sum(known) if len(known) == len(listed) else None
