"""Charts of the page as plotly's figures: quality over bytes, a line per policy, with error bars."""

from collections.abc import Iterator, Mapping, Sequence
from math import isnan, sqrt
from statistics import median
from typing import Any

from learnkv.evaluation.panels import (
    Panel,
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
from learnkv.evaluation.pictures import COLOURS, in_order
from learnkv.evaluation.report import LEARNED
from learnkv.evaluation.results import FULL, SCORED, Estimate

FOREGROUND = "#010203"
"""Stands for the colour of text, which the page knows when it is opened."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "pentagon", "star", "x", "cross", "hexagon")
DASHES = ("solid", "dash", "dot")
"""A dash for each round of colours."""


def pareto_charts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Title and figure of every kind, setting and length; of budgets in bytes with charts of their own.

    Tasks that the full cache fails are left out.
    """
    order = in_order(rows)
    return [
        {"title": f"{panel.title}, {panel.length:,} tokens", "figure": _figure(panel, group, order, in_bytes)}
        for panel, chosen in panels(answerable(rows)).items()
        for in_bytes, group in by_axis(chosen).items()
    ]


def kl_of(rows: Sequence[Row]) -> Estimate:
    """Mean KL over tasks, with its standard error where every task has one."""
    errors = [row.get("kl_stderr") for row in rows]
    known = [error for error in errors if error is not None]
    spread = sqrt(sum(error**2 for error in known)) / len(rows) if len(known) == len(rows) else float("nan")
    return Estimate(mean(rows, "kl"), spread, sum(row["n"] for row in rows))


def _figure(panel: Panel, rows: Sequence[Row], order: Sequence[str], in_bytes: bool) -> dict[str, Any]:
    scored = panel.kind in SCORED
    by_policy = grouped(rows)
    (full,) = by_policy.pop(FULL).values()
    traces = [
        _trace(order.index(name), name, list(cells.values()), scored, in_bytes)
        for name, cells in sorted(by_policy.items(), key=lambda item: order.index(item[0]))
    ]
    across = "part of the full cache's bytes at 16 bits" if in_bytes else "bytes kept per prompt"
    up = "score, mean over tasks" if scored else "KL to the full cache, nats per token (log)"
    own = {"range": [-2, 104]} if scored else {"type": "log", "dtick": "D2"}
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": f"{across} (log)"}, "type": "log", **_ticks(by_policy, in_bytes)},
        "yaxis": {"title": {"text": up}, **own},
    }
    if scored:
        traces.insert(0, _full_cache(full, in_bytes))
        best = score_of(full).mean
        line = {"color": FOREGROUND, "dash": "dash", "width": 1}
        layout["shapes"] = [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": best, "y1": best, "line": line}]
    return {"data": traces, "layout": layout}


def _ticks(by_policy: Mapping[str, Mapping[str, Sequence[Row]]], in_bytes: bool) -> dict[str, Any]:
    """A tick for every budget, where most policies are that have it."""
    sizes: dict[str, list[float]] = {}
    for cells in by_policy.values():
        for column, cell in cells.items():
            sizes.setdefault(column, []).append(_bytes(cell, in_bytes))
    medians = {column: median(values) for column, values in sizes.items()}
    texts = (f"{100 * value:.3g} %" if in_bytes else size(value) for value in medians.values())
    labels = [f"{column}<br>{text}" for column, text in zip(medians, texts, strict=True)]
    return {"tickvals": list(medians.values()), "ticktext": labels}


def _full_cache(rows: Sequence[Row], in_bytes: bool) -> dict[str, Any]:
    value = score_of(rows)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "full cache",
        "x": [_bytes(rows, in_bytes)],
        "y": [value.mean],
        "error_y": _errors([value]),
        "text": [f"full cache<br>{size(mean(rows, 'bytes'))}<br>{_shown(value, True)}"],
        "hoverinfo": "text",
        "marker": {"symbol": "star", "size": 11, "color": FOREGROUND},
    }


def _trace(index: int, name: str, cells: Sequence[Sequence[Row]], scored: bool, in_bytes: bool) -> dict[str, Any]:
    learned, colour = name.startswith(LEARNED), COLOURS[index % len(COLOURS)]
    values = [score_of(cell) if scored else kl_of(cell) for cell in cells]
    points = [value.mean if scored or value.mean > 0 else None for value in values]  # 0 has no place on a log axis
    apart = all(map(is_whole, (row for cell in cells for row in cell)))  # keeps everything: no curve over budgets
    return {
        "type": "scatter",
        "mode": "markers" if apart else "lines+markers",
        "name": name,
        "x": [_bytes(cell, in_bytes) for cell in cells],
        "y": points,
        "error_y": _errors(values),
        "text": list(_hovers(name, cells, values, scored)),
        "hoverinfo": "text",
        "marker": {"symbol": SYMBOLS[index % len(SYMBOLS)], "color": colour, "size": 10 if learned else 7},
        "line": {
            "color": colour,
            "dash": DASHES[index // len(COLOURS) % len(DASHES)],
            "width": 3 if learned else 1.5,
        },
    }


def _bytes(rows: Sequence[Row], in_bytes: bool) -> float:
    """Bytes per prompt, or the part of the full cache's at 16 bits."""
    return mean(rows, "bytes") / (mean(rows, "bytes_full") if in_bytes else 1)


def _errors(values: Sequence[Estimate]) -> dict[str, Any]:
    """Bars of one standard error; none where there is one sample."""
    spreads = [0.0 if isnan(value.stderr) else value.stderr for value in values]
    return {"type": "data", "array": spreads, "visible": any(spreads), "thickness": 1, "width": 3}


def _hovers(name: str, cells: Sequence[Sequence[Row]], values: Sequence[Estimate], scored: bool) -> Iterator[str]:
    for rows, value in zip(cells, values, strict=True):
        kept = f"{size(mean(rows, 'bytes'))}, {100 * mean(rows, 'spent'):.3g} % of the entries"
        yield f"{name}, {budget_label(rows[0])}<br>{kept}<br>{_shown(value, scored)}"


def _shown(value: Estimate, scored: bool) -> str:
    digits = 1 if scored else 4
    spread = "" if isnan(value.stderr) else f" ± {value.stderr:.{digits}f}"
    return f"{'score' if scored else 'KL'} {value.mean:.{digits}f}{spread}, n = {value.n}"
