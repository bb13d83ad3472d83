"""Pictures of a study that lists its comparisons."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learnkv.evaluation.results import FULL, Record, budget_of

DEPTHS = 5
"""Bins of a needle's place in the haystack."""
MOST_BITS = 9
"""8 bits with their scales."""
LEAST_KL = 1e-4
"""Below this, an axis of KL is not drawn: what is less is rounding."""


def needle_heatmap(records: Sequence[Record], policies: Sequence[str]) -> Figure | None:
    """KL by depth of the needle and length of the prompt, a panel per policy and budget.

    Returns:
        None without samples that know the depth of their needle.
    """
    known = [one for one in records if one.get("depth") is not None and one["policy"] != FULL]
    names = [name for name in policies if any(one["policy"] == name for one in known)]
    if not names:
        return None
    budgets = sorted(set(map(budget_of, known)), key=lambda budget: budget.order)
    lengths = sorted({one["length"] for one in known})
    figure = Figure(figsize=(1.6 + 2.3 * len(budgets), 0.9 + 1.7 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), len(budgets), squeeze=False, sharex=True, sharey=True)
    for row, name in zip(axes, names, strict=True):
        for axis, budget in zip(row, budgets, strict=True):
            own = [one for one in known if one["policy"] == name and budget_of(one) == budget]
            image = axis.imshow(_by_depth(own, lengths), vmin=-3, vmax=0.5, cmap="viridis_r", aspect="auto")
            axis.set_title(f"{name}, {budget}", fontsize=9)
            axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
            axis.set_yticks(range(DEPTHS), _depth_labels(), fontsize=8)
        row[0].set_ylabel("depth of the needle")
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    figure.colorbar(image, ax=axes, label="log10 of the KL to the full cache", shrink=0.8)
    return figure


def _depth_labels() -> list[str]:
    return [f"{100 * at // DEPTHS}-{100 * (at + 1) // DEPTHS} %" for at in range(DEPTHS)]


def _by_depth(records: Sequence[Record], lengths: Sequence[int]) -> np.ndarray:
    """Mean log10 KL [DEPTHS, lengths], nan where there is no sample."""
    cells: dict[tuple[int, int], list[float]] = {}
    for one in records:
        at = min(int(one["depth"] * DEPTHS / 100), DEPTHS - 1)
        cells.setdefault((at, lengths.index(one["length"])), []).append(one["kl"])
    means = np.full((DEPTHS, len(lengths)), np.nan)
    for (at, column), values in cells.items():
        means[at, column] = np.log10(max(fmean(values), LEAST_KL))
    return means


def bits(records: Sequence[Record], policy: str) -> Figure | None:
    """Bits of kept entries by layer and head, and of all entries by position, a column per budget.

    Returns:
        None where the policy's entries do not differ in precision.
    """
    own = [one for one in records if one["policy"] == policy and "bits" in one]
    if not own:
        return None
    budgets = sorted(set(map(budget_of, own)), key=lambda budget: budget.order)
    figure = Figure(figsize=(1.6 + 2.3 * len(budgets), 6.5), layout="constrained")
    axes = figure.subplots(2, len(budgets), squeeze=False, sharey="row", height_ratios=[3, 1])
    for column, budget in enumerate(budgets):
        those = [one for one in own if budget_of(one) == budget]
        by_head, by_position = (np.mean([one[key] for one in those], axis=0) for key in ("bits", "bits_by_position"))
        heads, line = axes[:, column]
        image = heads.imshow(by_head, vmin=0, vmax=MOST_BITS, cmap="viridis", aspect="auto")
        heads.set_title(str(budget), fontsize=9)
        heads.set_xticks(range(by_head.shape[1]))
        heads.set_xlabel("kv head")
        line.step((np.arange(len(by_position)) + 0.5) / len(by_position), by_position, where="mid")
        line.set_ylim(bottom=0)
        line.set_xlabel("position in the prompt")
        line.grid(True, linewidth=0.4, alpha=0.5)
    axes[0][0].set_ylabel("layer")
    axes[1][0].set_ylabel("bits, evicted at 0")
    figure.colorbar(image, ax=axes[0], label="bits per number of kept entries", shrink=0.8)
    figure.suptitle(f"Precision of {policy}", fontsize=11)
    return figure


def agreement(budgets: np.ndarray, others: dict[str, np.ndarray]) -> Figure | None:
    """Learned budgets [L, H] against scores of heads [L, H] of other methods, a panel each.

    Returns:
        None without other scores.
    """
    if not others:
        return None
    figure = Figure(figsize=(3.4 * len(others), 3.4), layout="constrained")
    axes = figure.subplots(1, len(others), squeeze=False)[0]
    for axis, (name, scores) in zip(axes, others.items(), strict=True):
        _scatter(axis, name, scores, budgets)
    axes[0].set_ylabel("learned: share of the budget")
    return figure


def _scatter(axis: Axes, name: str, scores: np.ndarray, budgets: np.ndarray) -> None:
    axis.scatter(scores.flatten(), budgets.flatten() / budgets.sum(), s=14, c=np.indices(budgets.shape)[0].flatten())
    axis.set_xlabel(name)
    axis.set_title(f"rank correlation {rank_correlation(scores, budgets):.2f}", fontsize=9)
    axis.grid(True, linewidth=0.4, alpha=0.5)


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, ties at their mean."""
    ranks = [pandas.Series(values.flatten()).rank() for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])
