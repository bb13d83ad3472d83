"""Figures of a comparison: quality against bytes, and a learned policy's budgets by layer and head."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learnkv.evaluation.panels import (
    Row,
    answerable,
    budget_label,
    by_axis,
    grouped,
    is_whole,
    mean,
    panels,
    score_of,
    size,
)
from learnkv.evaluation.report import LEARNED
from learnkv.evaluation.results import FULL, SCORED, Kind, Record
from learnkv.formats.files import atomic_write

MARKERS = "osD^vP*X<>hd"
LINES = ("-", "--", ":")
"""One round of colours per line style."""
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f", "#bcbd22")
HELD = "bytes held per prompt (log)"
NAMES_PER_COLUMN = 20
"""Names of the legend that fit beside a panel."""
MOST_LABELLED = 128
"""Heads of a heatmap up to which every cell shows its number."""


def pareto(rows: Sequence[Row]) -> Figure:
    """Score or KL against bytes per prompt, a panel per kind, setting and length, a line per policy.

    Budgets of bytes have panels of their own, with the part of the full cache's bytes at 16 bits across. Tasks that the
    full cache fails are left out.
    """
    groups = [(panel, *axis) for panel, chosen in panels(answerable(rows)).items() for axis in by_axis(chosen).items()]
    across = min(len(groups), 3)
    down = -(-len(groups) // across)
    columns = 1 + len({row["policy"] for row in rows}) // NAMES_PER_COLUMN
    figure = Figure(figsize=(1.5 + 5.2 * across + 2.6 * (columns - 1), 4.6 * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False).flatten()
    axes = grid[: len(groups)]
    for unused in grid[len(groups) :]:
        unused.remove()
    order = in_order(rows)
    for axis, (panel, in_bytes, group) in zip(axes, groups, strict=True):
        _panel(axis, group, order, panel.kind, in_bytes)
        title = panel.title.replace(": ", "\n").replace("; ", "\n")
        axis.set_title(f"{title} ({panel.length:,} tokens)", fontsize=10)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", ncols=columns, frameon=False)
    return figure


def in_order(rows: Sequence[Row]) -> list[str]:
    """Policies in the order of their colours, trained ones first; the full cache has none."""
    return sorted({row["policy"] for row in rows} - {FULL}, key=lambda name: (not name.startswith(LEARNED), name))


def _panel(axis: Axes, rows: Sequence[Row], order: Sequence[str], kind: Kind, in_bytes: bool) -> None:
    by_policy = grouped(rows)
    (full,) = by_policy.pop(FULL).values()
    if kind in SCORED:
        _full_cache_line(axis, full)
    elif in_bytes:
        axis.axvline(1, color="black", linestyle="--", linewidth=1, label="full cache")  # its KL is 0
    ticks: dict[str, list[float]] = {}
    for index, name in enumerate(order):
        if not (cells := by_policy.get(name, {})):
            continue
        if in_bytes and all(map(is_whole, itertools.chain(*cells.values()))):
            _whole_cache_lines(axis, index, name, list(cells.values()), kind)
            continue
        _policy_line(axis, index, name, list(cells.values()), kind, in_bytes)
        for column, cell in cells.items():
            ticks.setdefault(column, []).append(_held(cell, in_bytes))
    axis.set_xscale("log")
    medians = {column: float(np.median(sizes)) for column, sizes in ticks.items()}  # some methods keep the whole cache
    shown = (f"{100 * median:.3g} %" if in_bytes else size(median) for median in medians.values())
    labels = [f"{column}\n{value}" for column, value in zip(medians, shown, strict=True)]
    axis.set_xticks(list(medians.values()), labels, fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("bytes held per prompt, part of the full cache's at 16 bits (log)" if in_bytes else HELD)
    axis.set_ylabel("KL to the full cache, nats per token (log)" if kind not in SCORED else "score, mean over tasks")
    if kind not in SCORED:
        axis.set_yscale("log")
    else:
        axis.set_ylim(-2, 104)
    axis.grid(True, linewidth=0.4, alpha=0.5)


def _held(rows: Sequence[Row], in_bytes: bool) -> float:
    """Bytes per prompt, or the part of the full cache's at 16 bits."""
    return mean(rows, "bytes") / (mean(rows, "bytes_full") if in_bytes else 1)


def _full_cache_line(axis: Axes, rows: Sequence[Row]) -> None:
    best = score_of(rows).mean
    axis.axhline(best, color="black", linestyle="--", linewidth=1, label="full cache")
    label = f"{best:.1f} with {size(mean(rows, 'bytes'))}"
    axis.text(0.01, best - 1, label, transform=axis.get_yaxis_transform(), va="top", fontsize=8)


def _whole_cache_lines(axis: Axes, index: int, name: str, cells: Sequence[Sequence[Row]], kind: Kind) -> None:
    """What a cache of all entries in fewer bits is worth, and its part of the full cache's bytes."""
    for rows in cells:
        value = score_of(rows).mean if kind in SCORED else mean(rows, "kl")
        axis.axhline(value, color=COLOURS[index % len(COLOURS)], linestyle="-.", linewidth=1, label=name)
        label = f"{name}: {value:.3g} with {100 * _held(rows, True):.3g} %"
        axis.text(0.99, value, label, transform=axis.get_yaxis_transform(), ha="right", va="bottom", fontsize=8)


def _policy_line(axis: Axes, index: int, name: str, cells: Sequence[Sequence[Row]], kind: Kind, in_bytes: bool) -> None:
    learned = name.startswith(LEARNED)
    axis.errorbar(
        [_held(cell, in_bytes) for cell in cells],
        [score_of(cell).mean if kind in SCORED else mean(cell, "kl") for cell in cells],
        yerr=None if kind not in SCORED else np.nan_to_num([score_of(cell).stderr for cell in cells]),
        label=name,
        color=COLOURS[index % len(COLOURS)],
        marker=MARKERS[index % len(MARKERS)],
        linestyle=LINES[index // len(COLOURS) % len(LINES)],
        markersize=7 if learned else 5,
        linewidth=2.4 if learned else 1.2,
        zorder=3 if learned else 2,
        capsize=2,
    )


def heatmap(records: Sequence[Record], policy: str) -> Figure | None:
    """Mean kept fraction of every layer and head, a row of panels per setting, a column per budget.

    Returns:
        None where the records of the policy have no budgets.
    """
    cells: dict[tuple[str, str], list[list[list[float]]]] = {}
    for record in records:
        if record["policy"] == policy and "budgets" in record:
            cells.setdefault((record["setting"], budget_label(record)), []).append(record["budgets"])
    if not cells:
        return None
    settings, columns = (list(dict.fromkeys(key[part] for key in cells)) for part in (0, 1))
    layers, heads = np.shape(next(iter(cells.values()))[0])
    small = layers * heads <= MOST_LABELLED
    width, height = max(1.8, 0.5 * heads if small else 0.12 * heads), max(2.0, 0.3 * layers if small else 0.1 * layers)
    figure = Figure(
        figsize=(1.5 + (width + 0.3) * len(columns), 0.9 + (height + 0.5) * len(settings)), layout="constrained"
    )
    axes = figure.subplots(len(settings), len(columns), squeeze=False, sharex=True, sharey=True)
    for (setting, column), budgets in cells.items():
        axis = axes[settings.index(setting)][columns.index(column)]
        kept = np.mean(budgets, axis=0)
        image = axis.imshow(kept, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(f"{column}\n{setting.replace('_', '-')}", fontsize=9)
        if small:
            _label_cells(axis, kept)
    for axis in axes[-1]:
        axis.set_xlabel("kv head")
    for row in axes:
        row[0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="fraction of entries kept", shrink=0.8)
    figure.suptitle(f"Budgets of {policy}", fontsize=11)
    return figure


def _label_cells(axis: Axes, kept: np.ndarray) -> None:
    """Write the fractions [L, H] into their cells."""
    for (layer, head), fraction in np.ndenumerate(kept):
        colour = "black" if fraction > 0.6 else "white"
        axis.text(head, layer, f"{fraction:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(kept.shape[1]))
    axis.set_yticks(range(kept.shape[0]))


def save(figure: Figure, path: Path) -> None:
    """Write a png, replacing an older one in one step."""
    with atomic_write(path) as part:
        figure.savefig(part, dpi=130, format="png")
