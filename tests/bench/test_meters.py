"""The meter of the gates, on operations whose cost is known."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.meters import Meter, nbytes, slope

WEIGHT, FEW, SQUARE = torch.zeros(100, 8), torch.zeros(3, 8), torch.zeros(8, 2)
SOME = torch.tensor([1, 2, 2])
CASES = {
    "a product reads both and writes one": (lambda: WEIGHT.mm(SQUARE), 4 * (800 + 16 + 200)),
    "a view is free": (lambda: WEIGHT.view(8, 100)[2:].t(), 0),
    "an expanded dimension counts once": (lambda: WEIGHT[:1].expand(100, 8).sum(), 4 * (8 + 1)),
    "a lookup moves what it finds": (lambda: torch.nn.functional.embedding(SOME, WEIGHT), 3 * 8 + 2 * 4 * 24),
    "so does a gather": (lambda: WEIGHT.index_select(0, SOME), 3 * 8 + 2 * 4 * 24),
    "a write in place moves its source": (lambda: WEIGHT.index_copy_(0, SOME, FEW), 3 * 8 + 2 * 4 * 24),
    "so does an assignment": (lambda: WEIGHT[3:5].copy_(FEW[1:]), 2 * 4 * 16),
    "an allocation moves nothing": (lambda: torch.empty(1000), 0),
}


@pytest.mark.parametrize(("run", "expected"), CASES.values(), ids=CASES.keys())
def test_bytes(run: Callable[..., Any], expected: int) -> None:
    with Meter() as counts:
        run()
    assert counts.nbytes == expected


WAITS = {
    "item": lambda one: one[0].item(),
    "bool": lambda one: bool(one.any()),
    "int": lambda one: int(one.sum()),
    "tolist": lambda one: one.tolist(),
    "numpy": lambda one: one.numpy(),
    "nonzero": lambda one: one.nonzero(),
    "mask": lambda one: one[one > 0],
    "counts": lambda one: one.repeat_interleave(one.long()),
    "equal": lambda one: torch.equal(one, one),
}


@pytest.mark.parametrize("read", WAITS.values(), ids=WAITS.keys())
def test_waits(read: Callable[..., Any]) -> None:
    with Meter() as counts:
        read(torch.ones(5))
    assert sum(counts.waits.values()) == 1


def test_what_waits_for_nothing() -> None:
    one = torch.ones(5)
    with Meter() as counts:
        one[torch.tensor([0, 2])].repeat_interleave(3).masked_fill(torch.tensor(True), 0).sort()
        torch.nonzero_static(one, size=5)
    assert not counts.waits


def test_allocations() -> None:
    with Meter() as counts:
        held = torch.empty(100)
        held.add_(1).view(10, 10)
        (held + 1).sum()
    assert counts.storages == [400, 400, 4]
    assert (counts.largest, counts.kernels) == (400, 3)
    assert dict(counts.ops) == {"add_": 1, "add": 1, "sum": 1}
    assert nbytes(held.expand(7, 100)) == 400


def test_slope() -> None:
    assert slope([1, 2, 4], [7, 9, 13]) == pytest.approx(2)
