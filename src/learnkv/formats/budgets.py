"""`budgets.csv` of an exported policy: the kept fraction of every head at some global ones."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_text, table

Table = Mapping[float, Sequence[Sequence[float]]]
"""Global kept fraction -> [L][H]."""


def text(fractions: Table) -> str:
    """The file's content."""
    written = io.StringIO()
    rows = csv.writer(written, lineterminator="\n")
    rows.writerow(["layer", "head", *(f"keep_{keep:g}" for keep in fractions)])
    first = next(iter(fractions.values()))
    for layer, heads in enumerate(first):
        for head in range(len(heads)):
            rows.writerow([layer, head, *(f"{own[layer][head]:.6f}" for own in fractions.values())])
    return written.getvalue()


def read(path: str | Path) -> dict[float, list[list[float]]]:
    """Fractions [L][H] by global kept fraction.

    Raises:
        UserError: no such file, or another format.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path))))
    try:
        keeps = [name for name in rows[0] if name.startswith("keep_")]
        layers, heads = (1 + max(int(row[name]) for row in rows) for name in ("layer", "head"))
        numbers = [[float(row[name]) for row in rows] for name in keeps]
        fractions = [float(name.removeprefix("keep_")) for name in keeps]
    except (LookupError, TypeError, ValueError):
        raise UserError(f"{path}: expected the budgets.csv of an exported policy") from None
    if not keeps or len(rows) != layers * heads:
        raise UserError(f"{path}: expected a row for each of {layers} layers of {heads} heads, got {len(rows)}")
    held = table(path, numbers, "fractions").view(-1, layers, heads)
    return dict(zip(fractions, held.tolist(), strict=True))


def at(fractions: Table, keep: float) -> Tensor:
    """Fractions [L, H] at any global one, float64: linear between those known, nothing at 0 and everything at 1.

    Linear in the fraction itself, so that what is between spends what it should wherever its neighbours do.
    """
    one = torch.tensor(next(iter(fractions.values())), dtype=torch.float64)
    known = {0.0: torch.zeros_like(one), **{k: torch.tensor(v, dtype=torch.float64) for k, v in fractions.items()}}
    known |= {1.0: torch.ones_like(one)}
    order = sorted(known)
    right = next(at for at, one in enumerate(order) if one >= keep)
    left = max(right - 1, 0)
    share = 1.0 if left == right else (keep - order[left]) / (order[right] - order[left])
    return known[order[left]] * (1 - share) + known[order[right]] * share
