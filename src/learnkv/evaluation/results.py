"""From samples to the rows of a table: means, standard errors and paired differences."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import exp, nan, sqrt
from statistics import fmean, variance
from typing import Any, NamedTuple

Record = Mapping[str, Any]
FULL = "full"


class Estimate(NamedTuple):
    """A mean with its standard error over `n` samples (nan for one sample)."""

    mean: float
    stderr: float
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent samples."""
    spread = sqrt(variance(values) / len(values)) if len(values) > 1 else nan
    return Estimate(fmean(values), spread, len(values))


def mean_of_tasks(tasks: Iterable[Estimate]) -> Estimate:
    """Plain mean over tasks, every task counting the same however many samples it has."""
    each = list(tasks)
    spread = sqrt(sum(one.stderr**2 for one in each)) / len(each)
    return Estimate(fmean(one.mean for one in each), spread, sum(one.n for one in each))


def rows_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Rows of `results.json`: one per policy, task, length, setting and budget, in the order of the records.

    Records of the full cache (`policy` "full") give every row its `score_full`, over the same samples.
    """
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    full: dict[tuple[Any, ...], Record] = {}
    for record in records:
        groups[tuple(record[key] for key in ("policy", "task", "length", "setting", "keep", "budget"))].append(record)
        if record["policy"] == FULL:
            full[_sample(record)] = record
    return [_row(found, [full[_sample(record)] for record in found]) for found in groups.values()]


def _row(found: list[Record], full: list[Record]) -> dict[str, Any]:
    first, score = found[0], estimate([record["score"] for record in found])
    text = "loss" in first
    return {
        "policy": first["policy"],
        "task": first["task"],
        "length": first["length"],
        "setting": first["setting"],
        "keep": first["keep"] if first["keep"] is not None else fmean(record["asked"] for record in found),
        "budget": first["budget"],
        "spent": fmean(record["spent"] for record in found),
        "read": fmean(record.get("read", record["spent"]) for record in found),
        "prefills": fmean(record.get("prefills", 1.0) for record in found),
        "bytes": round(fmean(record["bytes"] for record in found)),
        "bytes_full": round(fmean(record["bytes_full"] for record in found)),
        "n": score.n,
        "score": score.mean,
        "score_full": fmean(record["score"] for record in full),
        "kl": fmean(record["kl"] for record in found) if text else None,
        "stderr": None if score.n < 2 else score.stderr,
        "haystack": first["haystack"],
        "perplexity": exp(fmean(record["loss"] for record in found)) if text else None,
        "perplexity_full": exp(fmean(record["loss"] for record in full)) if text else None,
    }


def paired_difference(rows_a: Iterable[Record], rows_b: Iterable[Record], value: str = "score") -> Estimate:
    """Mean over tasks of `value` in `rows_a` minus `rows_b`, samples of two policies paired by prompt.

    Prompts that only one of them has are left out; ValueError if there is no common one.
    """
    other = {_sample(record): record[value] for record in rows_b}
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in rows_a:
        if _sample(record) in other:
            by_task[record["task"]].append(record[value] - other[_sample(record)])
    if not by_task:
        raise ValueError("paired_difference: the two have no prompt in common")
    return mean_of_tasks(map(estimate, by_task.values()))


def _sample(record: Record) -> tuple[Any, ...]:
    return record["task"], record["length"], record["setting"], record["index"]
