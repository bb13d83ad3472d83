"""What compressing costs is counted: products, everything else, and sorted rows."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import compression_cost


def test_products_count_twice_and_other_numbers_once() -> None:
    matrix, row = torch.ones(4, 8), torch.ones(8, 3)
    assert compression_cost.counted(lambda: matrix @ row) == 2 * 4 * 8 * 3
    assert compression_cost.counted(lambda: matrix.t().exp()) == 32
    assert compression_cost.counted(lambda: matrix.sort(-1)) == 2 * 32 * 3  # values and indices


def test_every_part_of_a_compression_is_counted(tmp_path: Path) -> None:
    out = tmp_path / "cost.json"
    (row,) = compression_cost.main(["--dry-run", "--out", str(out)]).rows
    parts = [row[f"{name} over prefill"] for name in ("capturing", "planning", "storing")]
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(row["all over prefill"])
    assert json.loads(out.read_text())["rows"] == [row]


def test_the_committed_figures_are_below_the_bound() -> None:
    document = json.loads(Path("benchmarks/results/cpu/compression_cost.json").read_text())
    assert document["finished"]
    assert all(row["all over prefill"] <= row["bound"] for row in document["rows"])
