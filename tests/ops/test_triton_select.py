"""Exact top-k of ragged rows on the kernels: the same indices as a stable sort, ties included."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import DEVICE, draw, poisoned
from torch import Tensor

from learnkv.ops.select import select, select_slots

BLOCK = 4096


def check(scores: Tensor, budget: list[int]) -> Tensor:
    wanted = torch.tensor(budget)
    with poisoned():
        got = select(scores.to(DEVICE), wanted.to(DEVICE), sum(budget), impl="triton").cpu()
    assert torch.equal(got, select(scores, wanted, sum(budget), impl="reference"))
    return got


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    slots=st.sampled_from([1, 2, 77, 1000, BLOCK, BLOCK + 1, 2 * BLOCK + 300]),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    levels=st.sampled_from([1, 3, 40, None]),
    special=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_the_same_indices_as_a_stable_sort(
    slots: int, shares: list[float], levels: int | None, special: bool, seed: int
) -> None:
    """Scores of few levels tie often; special ones are infinite, negative zero and NaN, which a sort calls highest."""
    scores = draw(len(shares), slots, seed=seed).cpu()
    if levels is not None:
        scores = (scores * levels / 4).round() / levels
    if special:
        chance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
        for at, value in enumerate((torch.inf, -torch.inf, -0.0, 0.0, torch.nan)):
            scores[(chance > at / 20) & (chance < (at + 1) / 20)] = value
    check(scores, [round(share * slots) for share in shares])


def test_bits_in_every_digit() -> None:
    """Scores that differ in one of the 32 bits of a float only, so that each of the four histograms decides once."""
    base = 0x3F955A3C
    bits = torch.tensor([[base ^ (1 << bit) for bit in range(31)] + [base] * 3, list(range(base - 17, base + 17))])
    scores = bits.to(torch.int32).view(torch.float32)
    for kept in range(35):
        if kept % 5 == 2:
            check(scores, [kept, min(kept, 34)])


def test_ties_go_to_the_lower_slots_also_across_blocks() -> None:
    scores = torch.zeros(2, 2 * BLOCK + 100)
    scores[0, BLOCK + 7] = 1.0
    assert check(scores, [BLOCK + 3, 5]).tolist() == [
        *range(BLOCK + 2),
        BLOCK + 7,
        *range(scores.shape[1], scores.shape[1] + 5),
    ]


@pytest.mark.parametrize("budget", [[0, 0], [0, 10], [10, 0], [10, 10]])
def test_rows_that_keep_nothing_or_everything(budget: list[int]) -> None:
    check(draw(2, 10, seed=0).cpu(), budget)


@settings(max_examples=12)
@given(
    slots=st.sampled_from([1, 2, 77, 512, BLOCK + 1]),
    budget=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    spare=st.sampled_from([0, 3]),
    levels=st.sampled_from([1, 3, None]),
    seed=st.integers(0, 10**6),
)
def test_lists_of_one_size_for_all_rows(
    slots: int, budget: list[int], spare: int, levels: int | None, seed: int
) -> None:
    """What `select` gives of each row, then -1; entries that are not there are never listed, protected ones always."""
    scores = draw(len(budget), slots, seed=seed).cpu()
    if levels is not None:
        scores = (scores * levels / 4).round() / levels
    chance = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed))
    scores[chance < 0.2] = -torch.inf
    scores[chance > 0.97] = torch.inf
    most = max(budget) + spare
    with poisoned():
        got = select_slots(scores.to(DEVICE), torch.tensor(budget, device=DEVICE), most, impl="triton").cpu()
    assert got.shape == (len(budget), most)
    assert torch.equal(got, select_slots(scores, torch.tensor(budget), most, impl="reference"))
    for row, listed in enumerate(got.tolist()):
        there = int((scores[row] > -torch.inf).sum())
        kept = select(scores[row : row + 1], torch.tensor([min(budget[row], there)]), min(budget[row], there))
        assert listed == kept.tolist() + [-1] * (most - len(kept))
