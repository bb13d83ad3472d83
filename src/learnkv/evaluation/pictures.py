"""Pictures of a comparison: quality against bytes, and where a learned policy spends its budget."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from learnkv.evaluation.report import LEARNED, TITLES, Row, grouped, mean, panels, score_of, size
from learnkv.evaluation.results import FULL, Record
from learnkv.evaluation.store import replacing

MARKERS = "osD^vP*X<>hd"
LINES = ("-", "--", ":")
"""A round of colours each."""
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#e377c2", "#7f7f7f", "#bcbd22")


def pareto(rows: Sequence[Row]) -> Figure:
    """Score (for text: KL) against bytes held per prompt, a panel per setting and length, a line per policy."""
    found = panels(rows)
    across = min(len(found), 3)
    down = -(-len(found) // across)
    columns = 1 + len({row["policy"] for row in rows}) // 20  # as many names as fit beside a panel
    figure = Figure(figsize=(1.5 + 5.2 * across + 2.6 * (columns - 1), 4.6 * down), layout="constrained")
    every = figure.subplots(down, across, squeeze=False).flatten()
    axes = every[: len(found)]
    for unused in every[len(found) :]:
        unused.remove()
    order = sorted({row["policy"] for row in rows} - {FULL}, key=lambda name: (not name.startswith(LEARNED), name))
    for axis, ((is_text, setting, length), chosen) in zip(axes, found.items(), strict=True):
        _panel(axis, chosen, order, is_text)
        title = "Text" if is_text else TITLES[setting].replace(": ", "\n")
        axis.set_title(f"{title} ({length:,} tokens)", fontsize=10)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", ncols=columns, frameon=False)
    return figure


def _panel(axis: Axes, rows: Sequence[Row], order: Sequence[str], is_text: bool) -> None:
    by_policy = grouped(rows)
    (full,) = by_policy.pop(FULL).values()
    if not is_text:
        best = score_of(full).mean
        axis.axhline(best, color="black", linestyle="--", linewidth=1, label="full cache")
        inside = axis.get_yaxis_transform()
        axis.text(
            0.01, best - 1, f"{best:.1f} with {size(mean(full, 'bytes'))}", transform=inside, va="top", fontsize=8
        )
    ticks: dict[str, list[float]] = {}
    for at, name in enumerate(order):
        cells = by_policy.get(name, {})
        x = [mean(cell, "bytes") for cell in cells.values()]
        y = [cell[0]["kl"] if is_text else score_of(cell).mean for cell in cells.values()]
        spread = None if is_text else np.nan_to_num([score_of(cell).stderr for cell in cells.values()])
        learned = name.startswith(LEARNED)
        axis.errorbar(
            x,
            y,
            yerr=spread,
            label=name,
            color=COLOURS[at % len(COLOURS)],
            marker=MARKERS[at % len(MARKERS)],
            linestyle=LINES[at // len(COLOURS) % len(LINES)],
            markersize=7 if learned else 5,
            linewidth=2.4 if learned else 1.2,
            zorder=3 if learned else 2,
            capsize=2,
        )
        for column, held in zip(cells, x, strict=True):
            ticks.setdefault(column, []).append(held)
    axis.set_xscale("log")
    places = {column: float(np.median(held)) for column, held in ticks.items()}  # some hold the whole cache throughout
    axis.set_xticks(list(places.values()), [f"{column}\n{size(held)}" for column, held in places.items()], fontsize=8)
    axis.set_xticks([], minor=True)
    axis.set_xlabel("bytes held per prompt (log)")
    axis.set_ylabel("KL to the full cache, nats per token (log)" if is_text else "score, mean over tasks")
    if is_text:
        axis.set_yscale("log")
    else:
        axis.set_ylim(-2, 104)
    axis.grid(True, linewidth=0.4, alpha=0.5)


def heatmap(records: Sequence[Record], policy: str) -> Figure | None:
    """Mean kept fraction of every layer and head at every budget, a row of panels per setting; None if unknown."""
    cells: dict[tuple[str, str], list[list[list[float]]]] = {}
    for record in records:
        if record["policy"] == policy and "budgets" in record:
            column = f"keep {record['keep']:g}" if record["budget"] is None else f"budget {record['budget']}"
            cells.setdefault((record["setting"], column), []).append(record["budgets"])
    if not cells:
        return None
    settings, columns = (list(dict.fromkeys(key[at] for key in cells)) for at in (0, 1))
    layers, heads = np.shape(next(iter(cells.values()))[0])
    small = layers * heads <= 128
    width, height = max(1.8, 0.5 * heads if small else 0.12 * heads), max(2.0, 0.3 * layers if small else 0.1 * layers)
    figure = Figure(
        figsize=(1.5 + (width + 0.3) * len(columns), 0.9 + (height + 0.5) * len(settings)), layout="constrained"
    )
    axes = figure.subplots(len(settings), len(columns), squeeze=False, sharex=True, sharey=True)
    for (setting, column), found in cells.items():
        axis = axes[settings.index(setting)][columns.index(column)]
        kept = np.mean(found, axis=0)
        picture = axis.imshow(kept, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(f"{column}\n{setting.replace('_', '-')}", fontsize=9)
        if small:
            for layer in range(layers):
                for head in range(heads):
                    ink = "black" if kept[layer, head] > 0.6 else "white"
                    axis.text(head, layer, f"{kept[layer, head]:.2f}", ha="center", va="center", fontsize=7, color=ink)
            axis.set_xticks(range(heads))
            axis.set_yticks(range(layers))
    for axis in axes[-1]:
        axis.set_xlabel("kv head")
    for row in axes:
        row[0].set_ylabel("layer")
    figure.colorbar(picture, ax=axes, label="fraction of entries kept", shrink=0.8)
    figure.suptitle(f"Budgets of {policy}", fontsize=11)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a png, replacing an older one in one step."""
    with replacing(path) as part:
        figure.savefig(part, dpi=130, format="png")
