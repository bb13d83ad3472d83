"""What the policy relies on, for every allocator there is."""

from typing import Any

import pytest
import torch
from support import components
from support.components import ALLOCATORS, KNOWS_ITS_HEAD
from support.observations import observe
from torch import Tensor

from learnkv.allocators import AdaKV, Allocator
from learnkv.ops.round_to_budget import round_to_budget

LAYERS, HEADS = 3, 4
LENGTHS, BUDGETS = [70, 41, 12, 3, 1], [14.0, 30.5, 1.0, 2.0, 1.0]
PROTECTED = [4, 4, 0, 1, 0]

every_allocator = pytest.mark.parametrize("cls", ALLOCATORS)


def build(cls: type[Allocator]) -> Allocator:
    return components.build(cls, LAYERS, HEADS, 2, 16)


def scores_of(lengths: list[int], protected: list[int], seed: int = 0) -> Tensor:
    """Scores [L, B, H, S] of left-padded rows as the policy hands them over; a row depends on its length and seed."""
    scores = torch.full((LAYERS, len(lengths), HEADS, max(lengths)), -torch.inf)
    for row, (length, first) in enumerate(zip(lengths, protected, strict=True)):
        generator = torch.Generator().manual_seed(1000 * seed + length)
        own = torch.rand(LAYERS, HEADS, length, generator=generator) ** 4
        own[..., :first] = torch.inf
        scores[:, row, :, max(lengths) - length :] = own
    return scores


def wanted(
    allocator: Allocator, lengths: list[int], budgets: list[float], protected: list[int], seed: int = 0
) -> Tensor:
    budget = torch.tensor(budgets, dtype=torch.float64)
    return allocator(scores_of(lengths, protected, seed), features_of(allocator, lengths, seed), budget)


def features_of(allocator: Allocator, lengths: list[int], seed: int = 0) -> Tensor | None:
    window = max(8, allocator.window)
    obs = [
        observe(
            lengths,
            window=window,
            heads=HEADS,
            group=2,
            layer_idx=layer,
            seed=7 * seed + layer,
            statistics=allocator.statistics,
        )
        for layer in range(LAYERS)
    ]
    known = [one for one in map(allocator.features, obs) if one is not None]
    return torch.stack(known) if known else None


def test_the_walk_finds_the_allocators() -> None:
    assert {"AdaKV", "Pyramid", "Uniform"} <= {cls.__name__ for cls in ALLOCATORS}


@every_allocator
def test_a_padded_row_gets_what_it_gets_alone(cls: type[Any]) -> None:
    allocator = build(cls)
    together = wanted(allocator, LENGTHS, BUDGETS, PROTECTED)
    for row, (length, budget, protected) in enumerate(zip(LENGTHS, BUDGETS, PROTECTED, strict=True)):
        alone = wanted(allocator, [length], [budget], [protected])
        torch.testing.assert_close(together[:, row : row + 1], alone, rtol=1e-4, atol=1e-6)


@every_allocator
def test_wishes_can_be_made_exact(cls: type[Any]) -> None:
    wishes = wanted(build(cls), LENGTHS, BUDGETS, PROTECTED)
    assert wishes.shape == (LAYERS, len(LENGTHS), HEADS)
    assert wishes.dtype == torch.float64
    assert wishes.isfinite().all()
    assert (wishes >= 0).all()
    total = torch.tensor(BUDGETS).mul(LAYERS * HEADS).round().long()
    slots = round_to_budget(wishes, torch.tensor(LENGTHS), total, torch.tensor(PROTECTED))
    assert torch.equal(slots.sum((0, 2)), total)


@every_allocator
def test_keeping_everything_asks_for_everything(cls: type[Any]) -> None:
    full = [float(length) for length in LENGTHS]
    slots = round_to_budget(
        wanted(build(cls), LENGTHS, full, PROTECTED),
        torch.tensor(LENGTHS),
        torch.tensor(LENGTHS) * LAYERS * HEADS,
        torch.tensor(PROTECTED),
    )
    assert torch.equal(slots, torch.tensor(LENGTHS).view(1, -1, 1).expand_as(slots))


@every_allocator
def test_a_static_allocator_sees_no_scores_and_the_others_do(cls: type[Any]) -> None:
    allocator = build(cls)
    one, *others = (wanted(allocator, LENGTHS, BUDGETS, PROTECTED, seed) for seed in range(6))
    assert all(torch.equal(one, other) for other in others) == allocator.static  # a router may take two prompts alike


@pytest.mark.parametrize("cls", [cls for cls in ALLOCATORS if cls not in KNOWS_ITS_HEAD])
def test_permuted_heads_give_permuted_wishes(cls: type[Any]) -> None:
    allocator, order = build(cls), [2, 0, 3, 1]
    scores, budget = scores_of([50, 20], [3, 3]), torch.tensor([11.0, 9.0], dtype=torch.float64)
    features = features_of(allocator, [50, 20])
    moved = None if features is None else features[:, :, order]
    got = allocator(scores[:, :, order], moved, budget)
    torch.testing.assert_close(got, allocator(scores, features, budget)[:, :, order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", [cls for cls in ALLOCATORS if cls is not AdaKV])
def test_adakv_wraps_any_other(base: type[Any]) -> None:
    inner = build(base)
    both = wanted(AdaKV(inner), LENGTHS, BUDGETS, PROTECTED)
    alone = wanted(inner, LENGTHS, BUDGETS, PROTECTED)
    torch.testing.assert_close(both.sum(-1), alone.sum(-1).clamp(min=HEADS * torch.tensor(PROTECTED)))
