"""Whole budgets: exact, bounded, proportional, the same for a row in any batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnkv.ops.round_to_budget import round_in_order, round_layer, round_to_budget


@st.composite
def problems(draw: Callable[..., Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wishes [L, B, H] of any size with the entries, totals and protected numbers of every row."""
    layers, batch, heads = draw(st.integers(1, 5)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    wish = st.one_of(
        st.just(0.0), st.floats(1e-30, 1e-9), st.floats(1e-9, 3), st.floats(1e-9, 1e6), st.integers(0, 50).map(float)
    )
    count = layers * batch * heads
    wanted = torch.tensor(draw(st.lists(wish, min_size=count, max_size=count)), dtype=torch.float64)
    entries, protected, total = [], [], []
    for _ in range(batch):
        entries.append(draw(st.integers(1, 60)))
        protected.append(draw(st.integers(0, entries[-1])))
        total.append(draw(st.integers(layers * heads * protected[-1], layers * heads * entries[-1])))
    return wanted.view(layers, batch, heads), torch.tensor(entries), torch.tensor(total), torch.tensor(protected)


@settings(max_examples=120, deadline=None)
@given(problems())
def test_every_row_spends_exactly_its_total_within_bounds(problem: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    wanted, entries, total, protected = problem
    budgets = round_to_budget(wanted, entries, total, protected)
    assert budgets.dtype == torch.int64
    assert budgets.shape == wanted.shape
    assert torch.equal(budgets.sum((0, 2)), total)
    assert (budgets >= protected.view(1, -1, 1)).all()
    assert (budgets <= entries.view(1, -1, 1)).all()
    for row in range(wanted.shape[1]):
        alone = round_to_budget(
            wanted[:, row : row + 1], entries[row : row + 1], total[row : row + 1], protected[row : row + 1]
        )
        assert torch.equal(alone[:, 0], budgets[:, row])


@settings(max_examples=120, deadline=None)
@given(problems())
def test_layer_after_layer_every_row_spends_exactly_its_total_and_no_layer_waits_for_a_later_one(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Whatever earlier layers wish, also more or less than there is."""
    wanted, entries, total, protected = problem
    budgets = round_in_order(wanted, entries, total, protected)
    assert torch.equal(budgets.sum((0, 2)), total)
    assert (budgets >= protected.view(1, -1, 1)).all()
    assert (budgets <= entries.view(1, -1, 1)).all()
    for at in range(len(wanted)):
        before, left = wanted[:at].sum((0, 2)), total - budgets[:at].sum((0, 2))
        alone = round_layer(wanted[at], before, left, len(wanted) - 1 - at, entries, protected)
        assert torch.equal(alone, budgets[at])
    for row in range(wanted.shape[1]):
        mine = slice(row, row + 1)
        alone = round_in_order(wanted[:, mine], entries[mine], total[mine], protected[mine])
        assert torch.equal(alone[:, 0], budgets[:, row])


def test_layer_after_layer_fractions_add_up() -> None:
    """Sums over layers are rounded, not layers: 2.4 + 2.4 + 2.4 + 2.8 are 10."""
    wanted = torch.tensor([[[1.2, 1.2]], [[0.9, 1.5]], [[1.2, 1.2]], [[1.4, 1.4]]], dtype=torch.float64)
    got = round_in_order(wanted, torch.tensor([9]), torch.tensor([10]), torch.tensor([0]))
    assert got.sum((1, 2)).tolist() == [2, 3, 2, 3]
    assert got[1].tolist() == [[1, 2]]


def test_layer_after_layer_wishes_are_taken_at_their_word() -> None:
    """Not in proportion: a layer does not know what others will ask for. The last one takes what is left."""
    wanted = torch.tensor([[[4.0]], [[30.0]], [[0.0]], [[0.0]]], dtype=torch.float64)
    got = round_in_order(wanted, torch.tensor([9]), torch.tensor([16]), torch.tensor([1]))
    assert got.flatten().tolist() == [4, 9, 1, 2]
    got = round_in_order(wanted, torch.tensor([9]), torch.tensor([33]), torch.tensor([1]))
    assert got.flatten().tolist() == [6, 9, 9, 9]


@settings(max_examples=80, deadline=None)
@given(problems())
def test_the_budgets_are_scaled_clipped_wishes_to_within_one_entry(
    problem: tuple[Tensor, Tensor, Tensor, Tensor],
) -> None:
    """Water-filling found by bisection on the scale: an independent solution of the same equation."""
    wanted, entries, total, protected = problem
    budgets = round_to_budget(wanted, entries, total, protected)
    for row in range(wanted.shape[1]):
        wish = wanted[:, row].flatten()
        wish = wish / max(wish.mean(), 1e-300) + 1e-9
        low, high = float(protected[row]), float(entries[row])
        below, above = 0.0, 1e15
        for _ in range(200):
            scale = (below + above) / 2
            too_much = (wish * scale).clamp(low, high).sum() > total[row]
            below, above = (below, scale) if too_much else (scale, above)
        exact = (wish * below).clamp(low, high)
        assert (budgets[:, row].flatten() - exact).abs().max() < 1 + 1e-6


def test_whole_wishes_that_spend_the_total_are_left_alone() -> None:
    for seed in range(50):
        generator = torch.Generator().manual_seed(seed)
        wanted = torch.randint(3, 40, (6, 2, 4), generator=generator)
        total = wanted.sum((0, 2))
        for noise in (0, 1e-11):
            got = round_to_budget(
                wanted.double() + noise * torch.randn(6, 2, 4, generator=generator),
                torch.tensor([40, 50]),
                total,
                torch.tensor([3, 2]),
            )
            assert torch.equal(got, wanted)


def test_equal_wishes_differ_by_one_at_most_and_the_first_heads_get_more() -> None:
    got = round_to_budget(torch.full((3, 1, 2), 7.0), torch.tensor([10]), torch.tensor([21]), torch.tensor([2]))
    assert got.flatten().tolist() == [4, 4, 4, 3, 3, 3]
    assert (
        round_to_budget(torch.zeros(3, 1, 2), torch.tensor([10]), torch.tensor([21]), torch.tensor([2])).tolist()
        == got.tolist()
    )


def test_the_largest_remainders_get_the_last_entries() -> None:
    wanted = torch.tensor([[[1.2, 2.9, 3.5, 2.4]]])
    assert round_to_budget(wanted, torch.tensor([9]), torch.tensor([10]), torch.tensor([0])).flatten().tolist() == [
        1,
        3,
        4,
        2,
    ]


def test_what_one_head_cannot_hold_goes_to_the_others() -> None:
    """A plain clamp would spend 10 + 3 * 2 here."""
    wanted = torch.tensor([[[34.0, 2.0]], [[2.0, 2.0]]])
    got = round_to_budget(wanted, torch.tensor([10]), torch.tensor([40]), torch.tensor([1]))
    assert got.flatten().tolist() == [10, 10, 10, 10]
    got = round_to_budget(wanted, torch.tensor([10]), torch.tensor([25]), torch.tensor([1]))
    assert got.flatten().tolist() == [10, 5, 5, 5]


def test_one_dominant_head_takes_everything_but_the_protected_entries() -> None:
    wanted = torch.zeros(4, 1, 2)
    wanted[2, 0, 1] = 1.0
    got = round_to_budget(wanted, torch.tensor([1000]), torch.tensor([800]), torch.tensor([5]))
    assert got.flatten().tolist() == [5, 5, 5, 5, 5, 800 - 35, 5, 5]


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e5])
def test_only_proportions_matter(scale: float) -> None:
    wanted = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.1
    arguments = torch.tensor([50, 30]), torch.tensor([200, 111]), torch.tensor([2, 0])
    assert torch.equal(round_to_budget(wanted * scale, *arguments), round_to_budget(wanted, *arguments))


@pytest.mark.parametrize("seed", range(20))
def test_long_prompts_whose_heads_wish_nothing_or_very_much(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 3, (80, 3, 2), generator=generator) * 1e5
    entries = torch.randint(10_000, 131_072, (3,), generator=generator)
    protected = (entries * torch.rand(3, generator=generator) / 2).long()
    total = (160 * (protected + (entries - protected) * torch.rand(3, generator=generator, dtype=torch.float64))).long()
    budgets = round_to_budget(wanted, entries, total, protected)
    assert torch.equal(budgets.sum((0, 2)), total)
    assert (budgets >= protected.view(1, -1, 1)).all()
    assert (budgets <= entries.view(1, -1, 1)).all()
