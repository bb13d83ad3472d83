"""`budgets.csv` of an exported policy: the kept fraction of every head at each global one."""

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
            rows.writerow([layer, head, *(f"{values[layer][head]:.6f}" for values in fractions.values())])
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
    tables = table(path, numbers, "fractions").view(-1, layers, heads)
    return dict(zip(fractions, tables.tolist(), strict=True))


def interpolate(fractions: Table, keep: float) -> Tensor:
    """Fractions [L, H] at any global fraction, float64: linear between those of the table, all 0 at 0 and all 1 at 1.

    Linear in the fraction itself, so that the mean over heads is `keep` wherever it is at both neighbours.
    """
    tables = {key: torch.tensor(values, dtype=torch.float64) for key, values in fractions.items()}
    shape = next(iter(tables.values())).shape
    tables = {0.0: torch.zeros(shape).double(), **tables, 1.0: torch.ones(shape).double()}
    keys = sorted(tables)
    right = next(index for index, key in enumerate(keys) if key >= keep)
    left = max(right - 1, 0)
    share = 1.0 if left == right else (keep - keys[left]) / (keys[right] - keys[left])
    return tables[keys[left]] * (1 - share) + tables[keys[right]] * share
