"""Ragged top-k against a sort in Python."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.select import select

INF = float("inf")
# Few values, so that ties are everywhere.
values = st.sampled_from([INF, 2.0, 1.0, 0.5, 0.0, -0.0, -1.0, -1e30])


@st.composite
def problems(draw: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Scores [R, S], some of whose last or first entries are absent, and budgets [R]."""
    rows, slots = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    scores, budget = [], []
    for _ in range(rows):
        absent = draw(st.integers(0, slots))
        row = draw(st.lists(values, min_size=slots - absent, max_size=slots - absent))
        scores.append([-INF] * absent + row if draw(st.booleans()) else row + [-INF] * absent)
        budget.append(draw(st.integers(0, len(row))))
    return torch.tensor(scores), torch.tensor(budget)


def in_python(scores: Tensor, budget: Tensor) -> list[int]:
    slots, picked = scores.shape[1], []
    for row, count in enumerate(budget.tolist()):
        best = sorted(range(slots), key=lambda slot: (-float(scores[row, slot]), slot))[:count]
        picked += [row * slots + slot for slot in sorted(best)]
    return picked


@settings(max_examples=120, deadline=None)
@given(problems())
def test_the_best_of_every_row_ties_to_the_lower_slot(problem: tuple[Tensor, Tensor]) -> None:
    scores, budget = problem
    picked = select(scores, budget, int(budget.sum()))
    assert picked.dtype == torch.int64
    assert picked.tolist() == in_python(scores, budget)


def test_rows_that_keep_nothing_or_everything_or_all_of_it_in_one_row() -> None:
    scores = torch.randn(4, 301, generator=torch.Generator().manual_seed(0))
    for budget in ([0, 0, 0, 0], [301] * 4, [0, 301, 0, 0], [1, 0, 300, 7]):
        picked = select(scores, torch.tensor(budget), sum(budget))
        assert picked.tolist() == in_python(scores, torch.tensor(budget))


def test_protected_entries_are_kept_whatever_the_scores() -> None:
    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)) * 1e30
    scores[:, [0, 1, 39]] = INF
    picked = select(scores, torch.tensor([3, 3, 5]), 11).view(-1)
    assert {0, 1, 39, 40, 41, 79, 80, 81, 119} <= set(picked.tolist())


def test_an_implementation_that_is_not_there_is_not_replaced_silently() -> None:
    with pytest.raises(UserError, match="impl='nonsense': select has reference, triton"):
        select(torch.zeros(1, 2), torch.tensor([1]), 1, impl="nonsense")
