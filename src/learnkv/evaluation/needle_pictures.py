"""Heat maps of needles: score by the needle's depth and the prompt's length, one figure per task."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from learnkv.evaluation.panels import budget_label
from learnkv.evaluation.results import FULL, SCORED, Record, kind_of

GRID = "needle_grid"
"""How the names of the tasks begin whose records lie on a grid."""
ACROSS = 4
"""Policies side by side, where there is one budget."""
Cells = dict[tuple[str, str], list[Record]]


def needle_maps(records: Iterable[Record]) -> Mapping[str, Figure]:
    """Figures by their file names; a row of maps per policy, the full cache first, and a column per budget."""
    return {f"needles-{name}.png": _figure(name, cells) for name, cells in needle_cells(records).items()}


def needle_cells(records: Iterable[Record]) -> dict[str, Cells]:
    """Records by task and setting, then by policy and budget; the budget of the full cache is "all"."""
    groups: dict[str, Cells] = {}
    for record in records:
        if str(record["task"]).startswith(GRID):
            kind = kind_of(record)
            name = "-".join([record["task"], record["setting"], *([] if kind in SCORED else [kind])])
            label = "all" if record["policy"] == FULL else budget_label(record)
            groups.setdefault(name, {}).setdefault((record["policy"], label), []).append(record)
    return groups


def mean_scores(records: Sequence[Record]) -> dict[str, list[Any]]:
    """`lengths`, `depths`, and `scores` [depths, lengths]: means, None where nothing was measured."""
    lengths, depths = (sorted({record[key] for record in records}) for key in ("length", "depth"))
    cells: dict[tuple[float, int], list[float]] = {}
    for record in records:
        cells.setdefault((record["depth"], record["length"]), []).append(record["score"])
    scores = [[fmean(cells[cell]) if (cell := (d, n)) in cells else None for n in lengths] for d in depths]
    return {"lengths": lengths, "depths": depths, "scores": scores}


def _figure(name: str, cells: Cells) -> Figure:
    """A row per policy and a column per budget; of a single budget the policies side by side."""
    policies = list(dict.fromkeys(policy for policy, _ in cells))
    budgets = [label for label in dict.fromkeys(label for _, label in cells) if label != "all"] or ["all"]
    records = [record for group in cells.values() for record in group]
    lengths, depths = (sorted({record[key] for record in records}) for key in ("length", "depth"))
    grid: list[list[tuple[str, str]]] = [[(policy, budget) for budget in budgets] for policy in policies]
    if len(budgets) == 1:
        line = [pair for (pair,) in grid]
        grid = [line[begin : begin + ACROSS] for begin in range(0, len(line), ACROSS)]
    rows, columns = len(grid), max(map(len, grid))
    width, height = max(2.2, 0.62 * len(lengths)), max(1.8, 0.34 * len(depths))
    size = (1.6 + (width + 0.3) * columns, 1.0 + (height + 0.5) * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for row, column in product(range(rows), range(columns)):
        policy, budget = grid[row][column] if column < len(grid[row]) else (FULL, "")
        axis, label = axes[row][column], "all" if policy == FULL else budget
        if not budget or (policy, label) not in cells or (policy == FULL and (row, column) != (0, 0)):
            axis.set_axis_off()
            continue
        image = _map(axis, cells[policy, label], lengths, depths)
        axis.set_title(f"{policy}, {'everything kept' if label == 'all' else label}", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("tokens of the prompt")
    for first in axes:
        first[0].set_ylabel("depth, %")
    figure.colorbar(image, ax=axes, label="score", shrink=0.8)
    figure.suptitle(name.replace("_", " ").replace("-", ", "), fontsize=11)
    return figure


def _map(axis: Axes, records: Sequence[Record], lengths: Sequence[int], depths: Sequence[float]) -> AxesImage:
    """Mean scores, 0 to 100 from red to green, with their numbers; empty where nothing was measured."""
    means = np.full((len(depths), len(lengths)), np.nan)
    for row, depth in enumerate(depths):
        for column, length in enumerate(lengths):
            scores = [r["score"] for r in records if r["depth"] == depth and r["length"] == length]
            if scores:
                means[row, column] = np.mean(scores)
                mean = means[row, column]
                colour = "black" if 15 < mean < 85 else "white"
                axis.text(column, row, f"{mean:.0f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    return axis.imshow(means, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
