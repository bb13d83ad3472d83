"""Samples of one comparison as means over the tasks that count, and as differences paired by prompt."""

from collections.abc import Collection, Iterable, Sequence
from math import nan
from statistics import fmean

from learnkv.evaluation.budget import WHOLE
from learnkv.evaluation.results import (
    FULL,
    Estimate,
    Record,
    budget_of,
    estimate,
    mean_of_tasks,
    paired_difference,
    prompt_key,
)

LEARNED = "learned"
ROUNDING = 0.01
"""Of the prompt: a method that keeps this much more than its budget is not compared."""


class Scores:
    """Scores of all policies in one setting, at one length.

    Args:
        records: their samples, the full cache's among them.
        min_full_score: score of the full cache below which a task does not count.
        value: `score`, or `kl` of held-out text, where less is better.
        trained: methods whose weights were trained.

    Budgets are kept fractions of the entries or of the bytes (`unit`). `whole` has the samples of policies that keep
    every entry at fewer bits.
    """

    def __init__(
        self, records: Iterable[Record], min_full_score: float, value: str = "score", trained: Collection[str] = ()
    ) -> None:
        self.value, self.trained = value, trained
        records = list(records)
        by_task: dict[str, list[float]] = {}
        for record in records:
            if record["policy"] == FULL:
                by_task.setdefault(record["task"], []).append(record["score"])
        full = {task: fmean(scores) for task, scores in by_task.items()}
        self.tasks = [task for task in full if value != "score" or full[task] >= min_full_score]
        self.left_out = {task: score for task, score in full.items() if task not in self.tasks}
        self.records = [record for record in records if record["task"] in self.tasks]
        self.full = {prompt_key(record): record for record in self.records if record["policy"] == FULL}
        self.whole = _whole(self.records)
        self.unit = "bytes" if any(budget_of(record).bytes is not None for record in self.records) else "keep"
        self.cells: dict[tuple[str, float], list[Record]] = {}
        for record in self.records:
            if record["policy"] not in (FULL, *self.whole):
                budget = record["keep"] if self.unit == "keep" else record["bytes_budget"]
                self.cells.setdefault((record["policy"], budget), []).append(record)
        self.policies = list(dict.fromkeys(policy for policy, _ in self.cells))
        self.keeps = sorted({keep for _, keep in self.cells}, reverse=True)

    def of(self, policy: str, keep: float) -> Estimate:
        """Mean over tasks."""
        return _over_tasks((record["task"], record[self.value]) for record in self.cells[policy, keep])

    def of_whole(self, policy: str) -> Estimate:
        """Mean over tasks of a policy that keeps every entry."""
        return _over_tasks((record["task"], record[self.value]) for record in self.whole[policy])

    def retained(self, policy: str, keep: float) -> Estimate:
        """The same in percent of the full cache's score on the same prompts."""
        own, full = self.of(policy, keep), self.full_of(policy, keep)
        whole = full.mean or nan
        return Estimate(100 * own.mean / whole, 100 * own.stderr / whole, own.n)

    def full_of(self, policy: str, keep: float) -> Estimate:
        """Score of the full cache on the prompts of a cell."""
        cell = self.cells[policy, keep]
        return _over_tasks((record["task"], self.full[prompt_key(record)][self.value]) for record in cell)

    def below_full(self, policy: str, keep: float) -> Estimate:
        """Mean over tasks of what the full cache scores more on the same prompts."""
        cell = self.cells[policy, keep]
        return _over_tasks((one["task"], self.full[prompt_key(one)][self.value] - one[self.value]) for one in cell)

    def minus(self, policy: str, other: str, keep: float) -> Estimate:
        """Mean over tasks of the difference on the prompts that both have."""
        return paired_difference(self.cells[policy, keep], self.cells[other, keep], self.value)

    def contrast(self, policy: str, other: str, keep: float, factor: float) -> Estimate:
        """Mean over tasks of `policy` minus `factor` times `other` on the prompts that both have."""
        scaled = [{**one, self.value: factor * one[self.value]} for one in self.cells[other, keep]]
        return paired_difference(self.cells[policy, keep], scaled, self.value)

    def paired_ratio(self, policy: str, keep: float) -> Estimate:
        """Percent of the full cache's score on the same prompts, of each task; their mean. Errors to first order."""
        by_task: dict[str, list[tuple[float, float]]] = {}
        for one in self.cells[policy, keep]:
            pair = one[self.value], self.full[prompt_key(one)][self.value]
            by_task.setdefault(one["task"], []).append(pair)
        return mean_of_tasks(map(_ratio, by_task.values()))

    def ratio(self, policy: str, other: str, keep: float) -> float:
        """`policy` over `other` on the prompts that both have."""
        both = self._common(policy, other, keep)
        return fmean(own[self.value] for own, _ in both) / (fmean(other[self.value] for _, other in both) or nan)

    def mean_of(self, policy: str, keep: float, key: str) -> float:
        """Mean of `spent` or `bytes`."""
        return fmean(record[key] for record in self.cells[policy, keep])

    def others(self, keep: float) -> list[str]:
        """Other methods within the budget, trained ones too, the best first."""
        within = [
            policy
            for policy in self.policies
            if not policy.startswith(LEARNED) and (policy, keep) in self.cells and self._is_within(policy, keep)
        ]
        return sorted(within, key=lambda policy: self.of(policy, keep).mean * (-1 if self.value == "score" else 1))

    def rivals(self, keep: float, trained: bool = False) -> list[str]:
        """The others without training, or those that are `trained`."""
        return [other for other in self.others(keep) if (other in self.trained) == trained]

    def nearest(self, policy: str, keep: float, trained: bool = False) -> tuple[str, Estimate]:
        """The rival that `policy` is ahead of by least, and by how much."""
        differences = {rival: self.minus(policy, rival, keep) for rival in self.rivals(keep, trained)}
        nearest = min(differences, key=lambda rival: differences[rival].mean * (1 if self.value == "score" else -1))
        return nearest, differences[nearest]

    def _is_within(self, policy: str, keep: float) -> bool:
        """Whether a policy keeps what it was asked to."""
        if self.unit == "keep":
            return self.mean_of(policy, keep, "spent") <= keep + ROUNDING
        return all(record["bytes"] <= keep * record["bytes_full"] for record in self.cells[policy, keep])

    def _common(self, policy: str, other: str, keep: float) -> list[tuple[Record, Record]]:
        others = {prompt_key(record): record for record in self.cells[other, keep]}
        own = ((prompt_key(record), record) for record in self.cells[policy, keep])
        return [(record, others[key]) for key, record in own if key in others]


def best_of(settings: Iterable[Scores], count: int) -> list[str]:
    """The other methods whose mean over settings and kept fractions is highest."""
    total: dict[str, list[float]] = {}
    for scores in settings:
        for keep in scores.keeps:
            for rival in scores.others(keep):
                total.setdefault(rival, []).append(scores.of(rival, keep).mean)
    complete = max(map(len, total.values()), default=0)
    finished = [rival for rival, means in total.items() if len(means) == complete]
    return sorted(finished, key=lambda rival: -fmean(total[rival]))[:count]


def _whole(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Samples of the policies that were measured with every entry only, by policy; the full cache is none of them."""
    by_policy: dict[str, list[Record]] = {}
    for record in records:
        by_policy.setdefault(record["policy"], []).append(record)
    return {
        name: those
        for name, those in by_policy.items()
        if name != FULL and all(budget_of(one) == WHOLE for one in those)
    }


def _ratio(pairs: Sequence[tuple[float, float]]) -> Estimate:
    """Sum over sum in percent, with the error of its linearisation."""
    whole = fmean(full for _, full in pairs) or nan
    ratio = fmean(own for own, _ in pairs) / whole
    return Estimate(
        100 * ratio, 100 * estimate([(own - ratio * full) / whole for own, full in pairs]).stderr, len(pairs)
    )


def _over_tasks(values: Iterable[tuple[str, float]]) -> Estimate:
    by_task: dict[str, list[float]] = {}
    for task, value in values:
        by_task.setdefault(task, []).append(value)
    return mean_of_tasks(map(estimate, by_task.values()))
