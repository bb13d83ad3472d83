"""Heat maps of the page: needles by depth and length, budgets and bits by layer and head."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from learnkv.evaluation.kept_entries import VIEW, unpacked
from learnkv.evaluation.needle_pictures import mean_scores, needle_cells
from learnkv.evaluation.panels import budget_label
from learnkv.evaluation.results import FULL, Record

DIGITS = 4


def needle_maps(records: Iterable[Record]) -> list[dict[str, Any]]:
    """For every task and setting a map per policy and budget: mean scores [depths, lengths], None where none is."""
    return [
        {
            "title": name.replace("_", " ").replace("-", ", "),
            "maps": [
                {"policy": policy, "budget": budget, "n": len(group), **mean_scores(group)}
                for (policy, budget), group in cells.items()
            ],
        }
        for name, cells in needle_cells(records).items()
    ]


def budget_maps(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Mean kept fractions [L, H] of every policy and budget, and mean bits where entries are stored in fewer.

    Over all prompts of a policy whose records have budgets or bits, else over those that the viewer shows.
    """
    groups: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        if record["policy"] != FULL:
            groups.setdefault((record["policy"], budget_label(record), record["setting"]), []).append(record)
    maps = []
    for (policy, budget, setting), group in groups.items():
        views = [record[VIEW] for record in group if VIEW in record]
        kept = [record["budgets"] for record in group if "budgets" in record]
        fractions = kept or [unpacked(view).mean(-1) for view in views]
        if fractions:
            about = {"policy": policy, "budget": budget, "setting": setting.replace("_", "-"), "n": len(fractions)}
            kept_means = _rounded(np.mean(fractions, axis=0))
            maps.append({**about, "kept": kept_means, "bits": _mean_bits(_bits_of(group) or _bits_of(views))})
    return maps


def _bits_of(results: Iterable[Mapping[str, Any]]) -> list[list[list[float | None]]]:
    """The bits [L, H] of those records or views that have them."""
    return [result["bits"] for result in results if result.get("bits") is not None]


def _mean_bits(listed: Sequence[Sequence[Sequence[float | None]]]) -> list[list[float | None]] | None:
    """Mean [L, H] of the heads that have entries, None for one that never has; None where nothing is listed."""
    if not listed:
        return None
    bits = np.array(listed, dtype=float)
    known = np.nan_to_num(bits) > 0
    sums, counts = np.where(known, bits, 0).sum(0), known.sum(0)
    return [
        [round(total / count, 2) if count else None for total, count in zip(*row, strict=True)]
        for row in zip(sums.tolist(), counts.tolist(), strict=True)
    ]


def _rounded(values: np.ndarray) -> list[list[float]]:
    rounded: list[list[float]] = np.round(values, DIGITS).tolist()
    return rounded
