"""From samples to the rows of a table: means, standard errors and paired differences."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import exp, nan, sqrt
from statistics import fmean, variance
from typing import Any, Literal, NamedTuple

from learnkv.evaluation.budget import Budget
from learnkv.evaluation.provenance import tasks_of

Record = Mapping[str, Any]
FULL = "full"
Kind = Literal["generated", "choices", "forced", "text"]
SCORED: tuple[Kind, ...] = ("generated", "choices")
"""Kinds that are compared by their score; the others by the KL."""


SCHEMA = 2
"""Of `results.json`."""
ADDED: Mapping[str, Any] = {"metric": "generated", "bytes_budget": None, "asked_bytes": None, "precision": None}
"""Keys that samples and rows of earlier versions lack, and what holds for these."""
GROUP = ("policy", "metric", "task", "length", "setting", "keep", "budget", "bytes_budget")
"""Keys that the samples of a row have in common."""


FIDELITY = ("flips", "agreement", "length_drift", "quote")
"""Keys of the samples and rows of the task `fidelity`."""


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
    """Unweighted mean over tasks, whatever their numbers of samples."""
    estimates = list(tasks)
    spread = sqrt(sum(task.stderr**2 for task in estimates)) / len(estimates)
    return Estimate(fmean(task.mean for task in estimates), spread, sum(task.n for task in estimates))


def rows_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Rows of `results.json`: one per policy, task, length, setting and budget, in the order of the records.

    Records of the full cache (`policy` "full") give every row its `score_full`, over the same samples.
    """
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    full: dict[tuple[Any, ...], Record] = {}
    for record in map(upgraded, records):
        groups[tuple(record[key] for key in GROUP)].append(record)
        if record["policy"] == FULL:
            full[prompt_key(record)] = record
    return [_row(group, [full[prompt_key(record)] for record in group]) for group in groups.values()]


def upgraded(result: Record) -> dict[str, Any]:
    """A sample or a row, also of an earlier version, with the keys of this one."""
    return {**ADDED, **result}


def budget_of(result: Record) -> Budget:
    """The budget of a sample or a row."""
    result = upgraded(result)
    if result["bytes_budget"] is not None:
        return Budget(bytes=result["bytes_budget"])
    return Budget(keep=result["keep"]) if result["budget"] is None else Budget(tokens=result["budget"])


def _keep_of(group: list[Record]) -> float | None:
    """Fraction of the entries that was asked for; None where bytes were."""
    keep: float | None = group[0]["keep"]
    return keep if group[0]["budget"] is None else fmean(record["asked"] for record in group)


def _row(group: list[Record], full: list[Record]) -> dict[str, Any]:
    first, score = group[0], estimate([record["score"] for record in group])
    kind = kind_of(first)
    kls = estimate([record["kl"] for record in group]) if kind != "generated" else None
    return {
        "policy": first["policy"],
        "task": first["task"],
        "length": first["length"],
        "setting": first["setting"],
        "keep": _keep_of(group),
        "budget": first["budget"],
        "bytes_budget": first["bytes_budget"],
        "asked_bytes": None if first["asked_bytes"] is None else round(fmean(r["asked_bytes"] for r in group)),
        "precision": first["precision"],
        "spent": fmean(record["spent"] for record in group),
        "coverage": fmean(r["coverage"] for r in group) if all("coverage" in r for r in group) else None,
        "read": fmean(record.get("read", record["spent"]) for record in group),
        "prefills": fmean(record.get("prefills", 1.0) for record in group),
        "bytes": round(fmean(record["bytes"] for record in group)),
        "bytes_full": round(fmean(record["bytes_full"] for record in group)),
        "n": score.n,
        **tasks_of(group),
        "score": score.mean,
        "score_full": fmean(record["score"] for record in full),
        "metric": first["metric"],
        "kl": None if kls is None else kls.mean,
        "kl_stderr": None if kls is None or kls.n < 2 else kls.stderr,
        "stderr": None if score.n < 2 else score.stderr,
        "haystack": first["haystack"],
        "perplexity": exp(fmean(record["loss"] for record in group)) if kind == "text" else None,
        "perplexity_full": exp(fmean(record["loss"] for record in full)) if kind == "text" else None,
        **(_fidelity(group, full) if all(key in first for key in FIDELITY) else {}),
        **_cost(group),
        **_accepted(group),
    }


def _fidelity(group: list[Record], full: list[Record]) -> dict[str, Any]:
    """Means over the prompts; of the drift its size."""
    means = {key: fmean(abs(record[key]) for record in group) for key in FIDELITY}
    return {**means, "quote_full": fmean(record["quote"] for record in full)}


def _cost(group: list[Record]) -> dict[str, Any]:
    """Time and memory of the records that have them; None where none has."""
    timed = [record for record in group if record.get("prefill_seconds") is not None]
    peaks = [record["peak_bytes"] for record in timed if record["peak_bytes"] is not None]
    written = [record for record in timed if record["decode_seconds"] is not None]
    decoded = sum(record["decode_seconds"] for record in written)
    return {
        "prefill_seconds": fmean(record["prefill_seconds"] for record in timed) if timed else None,
        "tokens_per_second": sum(record["tokens"] for record in written) / decoded if decoded else None,
        "peak_bytes": max(peaks, default=None),
    }


def _accepted(records: list[Record]) -> dict[str, Any]:
    """The columns of a row: tokens drafted per round, and how many were accepted; None where it was not measured."""
    measured = [record for record in records if record.get("rounds")]
    if not measured:
        return {"draft_tokens": None, "accepted": None}
    rounds = sum(record["rounds"] for record in measured)
    accepted = sum(record["accepted"] for record in measured)
    return {"draft_tokens": measured[0]["draft_tokens"], "accepted": accepted / rounds}


def paired_difference(rows_a: Iterable[Record], rows_b: Iterable[Record], value: str = "score") -> Estimate:
    """Mean over tasks of `value` in `rows_a` minus `rows_b`, samples of two policies paired by prompt.

    Prompts that only one of them has are left out; ValueError if there is no common one.
    """
    other = {prompt_key(record): record[value] for record in rows_b}
    by_task: dict[str, list[float]] = defaultdict(list)
    for record in rows_a:
        if (key := prompt_key(record)) in other:
            by_task[record["task"]].append(record[value] - other[key])
    if not by_task:
        raise ValueError("paired_difference: the two have no prompt in common")
    return mean_of_tasks(map(estimate, by_task.values()))


def prompt_key(record: Record) -> tuple[Any, ...]:
    """Identity of the prompt that a record is about, whatever the policy and the budget."""
    return record["metric"], record["task"], record["length"], record["setting"], record["index"]


def kind_of(result: Mapping[str, Any]) -> Kind:
    """What a record or a row is about: generated answers, choices or answers that were read, or text."""
    if result.get("loss", result.get("perplexity")) is not None:
        return "text"
    metric = result.get("metric")
    return metric if metric in ("forced", "choices") else "generated"
