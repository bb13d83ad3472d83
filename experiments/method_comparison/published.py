"""Published orders of methods, and whether a comparison confirms them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log
from statistics import fmean
from typing import Any

from learnkv.evaluation.results import Record, paired_difference

TIE = 1.0
"""Points of a published score below which no order is read from it: figures were read off plots."""
CLEAR = 2.0
"""Standard errors that a measured difference has to exceed."""


@dataclass(frozen=True)
class Published:
    """Scores that one source printed or plotted, by policy name, at one fraction kept."""

    source: str
    setting: str
    keep: float
    scores: Mapping[str, float]


_LEADERBOARD = "kvpress's leaderboard, RULER at 4,096 tokens, Llama-3.1-8B-Instruct, read off its plot"
_DEFENSIVE = "the authors of DefensiveKV (arXiv 2510.13334), RULER at a fifth of the cache"
_ADAKV = "the authors of Ada-KV (arXiv 2407.11550), LongBench, Mistral-7B, 128 entries per head"
_NAMES = ("kvzip", "keydiff", "expected_attention", "snapkv", "pyramidkv", "streaming_llm")

ORDERS = (
    Published(
        _LEADERBOARD, "query_agnostic", 0.5, dict(zip(_NAMES, (95.1, 84.8, 74.7, 67.0, 67.9, 60.0), strict=True))
    ),
    Published(
        _LEADERBOARD, "query_agnostic", 0.25, dict(zip(_NAMES, (95.0, 74.3, 52.6, 39.9, 39.9, 40.0), strict=True))
    ),
    Published(
        _LEADERBOARD, "query_agnostic", 0.1, dict(zip(_NAMES, (92.3, 65.3, 27.5, 23.6, 23.6, 26.4), strict=True))
    ),
    Published(
        _DEFENSIVE,
        "query_agnostic",
        0.2,
        {"snapkv": 39.0, "adakv": 46.0, "critical_adakv": 62.9, "defensivekv": 85.3, "layer_defensivekv": 91.4},
    ),
    Published(_ADAKV, "query_aware", 0.1, {"pyramidkv": 34.69, "snapkv": 34.55}),
)


@dataclass(frozen=True)
class Pair:
    """Two methods of a published order, the better one first, and their measured difference."""

    source: str
    setting: str
    published_keep: float
    keep: float
    better: str
    worse: str
    published: tuple[float, float]
    ours: tuple[float, float]
    difference: float
    """Mean over tasks of the score of `better` minus that of `worse`, on the same prompts; of KL reversed."""
    stderr: float
    n: int

    @property
    def verdict(self) -> str:
        """`agrees` or `disagrees` where the measured difference is clear, else `undecided`; `tied` as published."""
        if self.published[0] - self.published[1] < TIE:
            return "tied"
        if not abs(self.difference) > CLEAR * self.stderr:
            return "undecided"
        return "agrees" if self.difference > 0 else "disagrees"


def pairs(records: Sequence[Record], orders: Sequence[Published] = ORDERS) -> Iterator[Pair]:
    """Every pair of every published order of which both methods are among the records, at the nearest fraction.

    Of answers that were read, the method with less KL from the full cache is the better one: few are exact.
    """
    value = "kl" if any(record["metric"] == "forced" for record in records) else "score"
    cells: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        cells.setdefault((record["setting"], record["policy"], record["keep"]), []).append(record)
    for order in orders:
        keeps = sorted({keep for setting, _, keep in cells if setting == order.setting and keep and keep < 1})
        if not keeps:
            continue
        keep = min(keeps, key=lambda fraction: abs(log(fraction / order.keep)))
        ranked = sorted(order.scores, key=lambda name: -order.scores[name])
        present = [name for name in ranked if (order.setting, name, keep) in cells]
        for better, worse in combinations(present, 2):
            upper, lower = (cells[order.setting, name, keep] for name in (better, worse))
            difference = paired_difference(*((upper, lower) if value == "score" else (lower, upper)), value)
            yield Pair(
                order.source,
                order.setting,
                order.keep,
                keep,
                better,
                worse,
                (order.scores[better], order.scores[worse]),
                (_mean(upper, value), _mean(lower, value)),
                difference.mean,
                difference.stderr,
                difference.n,
            )


def _mean(records: Sequence[Record], value: str) -> float:
    by_task: dict[str, list[float]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record[value])
    return sum(map(fmean, by_task.values())) / len(by_task)
