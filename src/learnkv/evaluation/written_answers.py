"""The table of long answers: accuracy against bytes held and tokens generated."""

from collections.abc import Iterable, Iterator
from statistics import fmean

from learnkv.evaluation.panels import budget_label, plus_minus, size, table
from learnkv.evaluation.results import FULL, Record, estimate

TASKS = ("gsm8k", "math500", "aime")


def written_answers(records: Iterable[Record]) -> Iterator[str]:
    """Lines of a table per task, length and setting; none where no such answer was written."""
    panels: dict[tuple[str, int, str], dict[tuple[str, str], list[Record]]] = {}
    for record in records:
        if record["task"] in TASKS and record["metric"] == "generated":
            panel = panels.setdefault((record["task"], record["length"], record["setting"]), {})
            label = "everything" if record["policy"] == FULL else budget_label(record)
            panel.setdefault((record["policy"], label), []).append(record)
    for (task, length, setting), cells in panels.items():
        yield from (f"## {task}, {setting.replace('_', '-')}, {length:,} tokens", "")
        yield from (
            "Bytes: the most that were held while the answer was written, prompt and answer together, a prompt's mean.",
            "",
        )
        rows = ([policy, label, *_cells(group)] for (policy, label), group in cells.items())
        yield from table(["policy", "budget", "accuracy", "bytes held", "of a full cache", "tokens generated"], rows)


def _cells(records: list[Record]) -> Iterator[str]:
    nbytes, nbytes_full = (fmean(record[key] for record in records) for key in ("bytes", "bytes_full"))
    yield plus_minus(estimate([record["score"] for record in records]))
    yield size(nbytes)
    yield f"{100 * nbytes / nbytes_full:.0f} %"
    yield plus_minus(estimate([record["tokens"] for record in records]))
