"""Tables of the page: every row of the results, and differences of policies paired by prompt."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from learnkv.evaluation.budget import Budget
from learnkv.evaluation.panels import Panel, Row, answerable, budget_label, panel_of
from learnkv.evaluation.results import FULL, SCORED, Record, budget_of, kind_of, paired_difference

EVERYTHING = "everything"
"""The budget of the full cache."""


class Column(NamedTuple):
    """A column of the table: how its cells are shown and what its heading explains."""

    key: str
    label: str
    shown: str
    """`text`, `bytes`, or the digits of a number."""
    about: str = ""


COLUMNS = (
    Column("policy", "policy", "text"),
    Column("task", "task", "text"),
    Column("setting", "setting", "text", "whether the question was compressed with the context"),
    Column(
        "kind", "measured", "text", "what was scored: generated, or correct answers, choices or text that were read"
    ),
    Column("length", "tokens", "0", "tokens of the prompt"),
    Column("budget", "budget", "text"),
    Column("precision", "bits", "text", "bits of keys and values"),
    Column("bytes", "bytes", "bytes", "bytes kept per prompt"),
    Column("spent", "kept", "3", "fraction of the entries that was kept"),
    Column("n", "n", "0", "prompts"),
    Column("score", "score", "1", "0 to 100"),
    Column("stderr", "± score", "1", "standard error of the score"),
    Column("score_full", "full", "1", "score of the full cache on the same prompts"),
    Column("kl", "KL", "4", "to the full cache, nats per token"),
    Column("kl_stderr", "± KL", "4", "standard error of the KL"),
    Column("perplexity", "perplexity", "2"),
    Column("prefill_seconds", "prefill, s", "3", "seconds to read, score and evict a prompt"),
    Column("tokens_per_second", "tokens/s", "0", "tokens that a batch generated or read per second"),
    Column("peak_bytes", "peak", "bytes", "most memory, the model included"),
)


def task_table(rows: Sequence[Row]) -> dict[str, Any]:
    """Columns that have a value, and the cells of every row; numbers are not rounded, so that they sort exactly."""
    cells = [{**row, **_words(row)} for row in rows]
    columns = [column for column in COLUMNS if any(cell.get(column.key) is not None for cell in cells)]
    return {
        "columns": [column._asdict() for column in columns],
        "rows": [[cell.get(column.key) for column in columns] for cell in cells],
    }


def budget_words(result: Row | Record) -> str:
    """The budget of a row or record, that of the full cache in words."""
    return EVERYTHING if result["policy"] == FULL else budget_label(result)


def _words(row: Row) -> dict[str, Any]:
    setting = None if kind_of(row) == "text" else row["setting"].replace("_", "-")
    return {"setting": setting, "kind": kind_of(row), "budget": budget_words(row)}


def differences(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Paired differences of all policies in every kind, setting and length.

    Returns:
        `title`, `value` (score or KL), names of `policies` and `budgets`, and `cells`: first and second policy and
        budget by number, then mean, standard error (None for one sample) and n of the first minus the second. The
        full cache is compared at every budget.
    """
    groups: dict[Panel, list[Record]] = {}
    for record in answerable(records):
        groups.setdefault(panel_of(record), []).append(record)
    compared = [_differences(panel, group) for panel, group in groups.items()]
    return [panel for panel in compared if panel["cells"]]


def _differences(panel: Panel, records: Sequence[Record]) -> dict[str, Any]:
    by_policy: dict[str, dict[Budget, list[Record]]] = {}
    for record in records:
        by_policy.setdefault(record["policy"], {}).setdefault(budget_of(record), []).append(record)
    policies = list(by_policy)
    budgets = sorted({b for name in policies if name != FULL for b in by_policy[name]}, key=lambda b: b.order)
    value = "score" if panel.kind in SCORED else "kl"
    cells = [
        [first, second, number, *cell]
        for (first, a), (second, b) in combinations(enumerate(policies), 2)
        for number, budget in enumerate(budgets)
        if (cell := _pair(_records_of(by_policy, a, budget), _records_of(by_policy, b, budget), value))
    ]
    title = f"{panel.title}, {panel.length:,} tokens"
    return {
        "title": title,
        "value": value,
        "digits": 1 if value == "score" else 4,
        "policies": policies,
        "budgets": list(map(str, budgets)),
        "cells": cells,
    }


def _records_of(
    by_policy: Mapping[str, Mapping[Budget, Sequence[Record]]], name: str, budget: Budget
) -> Sequence[Record]:
    """Records of a policy at a budget; those of the full cache at every one."""
    cells = by_policy[name]
    return next(iter(cells.values())) if name == FULL else cells.get(budget, ())


def _pair(first: Sequence[Record], second: Sequence[Record], value: str) -> list[Any] | None:
    """Mean, standard error and n; None where the two have no prompt in common."""
    try:
        mean, stderr, n = paired_difference(first, second, value)
    except ValueError:
        return None
    return [mean, None if stderr != stderr else stderr, n]
