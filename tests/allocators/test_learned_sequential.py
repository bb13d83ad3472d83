"""Budgets decided layer by layer: exact, at first the heuristic's, blind to later layers, with the right gradient."""

import random

import pytest
import torch
from support.observations import randomised
from torch import Tensor

from learnkv.allocators import AdaKV, LayerByLayer, LearnedAllocator, LearnedSequentialAllocator, Pyramid, Uniform
from learnkv.allocators.conditioning import KNOTS
from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_in_order, round_to_budget

LAYERS, HEADS = 5, 3


def prompt(seed: int, keep: float, slots: int, layers: int = LAYERS, heads: int = HEADS) -> tuple[Tensor, ...]:
    """Scores [L, B, H, S] of two rows, the second one padded, with entries, total and protected of each row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(layers, 2, heads, slots, generator=generator) ** 3
    entries = torch.tensor([slots, slots - 5])
    scores[:, 1, :, :5] = -torch.inf
    total = torch.round(keep * entries * layers * heads).long().clamp(min=layers * heads)
    protected = (total // (2 * layers * heads)).clamp(max=12)
    for row in range(2):
        scores[:, row, :, slots - int(protected[row]) :] = torch.inf
    return scores, entries, total, protected


def attention(seed: int, layers: int = LAYERS, heads: int = HEADS) -> Tensor:
    return torch.rand(layers, 2, heads, 3, generator=torch.Generator().manual_seed(seed))


def wishes(allocator: Allocator, scores: Tensor, total: Tensor, features: Tensor | None) -> Tensor:
    return allocator(scores, features, total / (scores.shape[0] * scores.shape[2]))


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize(
    "base",
    [Uniform(), Pyramid(), Pyramid(beta=2, rounding="original"), LayerByLayer(), LayerByLayer(Pyramid())],
    ids=str,
)
def test_at_the_start_the_budgets_are_the_heuristics_to_the_entry(base: Allocator, conditioned: bool) -> None:
    learned = LearnedSequentialAllocator(base, LAYERS, HEADS, conditioned)
    exact = round_in_order if base.sequential else round_to_budget
    for seed in range(16):
        scores, *bounds = prompt(seed, 0.03 + 0.06 * seed, 40 + 77 * seed)
        entries, total, protected = bounds
        ours = round_in_order(
            wishes(learned, scores, total, attention(seed) if conditioned else None), entries, total, protected
        )
        assert torch.equal(ours, exact(wishes(base, scores, total, None), entries, total, protected)), seed


def test_heads_share_a_layers_budget_by_its_scores_alone() -> None:
    scores, entries, total, protected = prompt(0, 0.2, 200)
    layerwise, ada = LayerByLayer(Pyramid(), AdaKV(floor=0.1)), AdaKV(Pyramid(), floor=0.1)
    ours, theirs = (wishes(one, scores, total, None) for one in (layerwise, ada))
    layers = round_to_budget(wishes(Pyramid(), scores, total, None), entries, total, protected).sum(-1)
    torch.testing.assert_close(ours.sum(-1), layers.double())
    assert (ours - theirs).abs().max() < 2  # whole entries of a layer, a head's places among them
    assert ours.std(-1).mean() > 1
    scores[2:] = scores[2:].flip(-2)
    assert torch.equal(wishes(layerwise, scores, total, None)[:2], ours[:2])


@pytest.mark.parametrize("strength", [0.3, 30.0])
def test_any_parameters_spend_the_budget_of_any_shape(strength: float) -> None:
    """Learned corrections of e^30, too: layers that would take everything, and heads that would."""
    rng = random.Random(int(strength))
    for seed in range(16):
        layers, heads = rng.randint(1, 7), rng.randint(1, 4)
        base = rng.choice([Uniform(), Pyramid(), LayerByLayer(Pyramid())])
        learned = randomised(LearnedSequentialAllocator(base, layers, heads, conditioned=seed % 2 == 0))
        for held in learned.parameters():
            held.data *= strength
        scores, entries, total, protected = prompt(seed, rng.random() ** 2, rng.randint(6, 300), layers, heads)
        wanted = wishes(learned, scores, total, attention(seed, layers, heads))
        torch.testing.assert_close(wanted.sum((0, 2)), total.double(), rtol=1e-9, atol=1e-6)
        assert (wanted >= protected.view(1, 2, 1) - 1e-6).all()
        assert (wanted <= entries.view(1, 2, 1) + 1e-6).all()
        budgets = round_in_order(wanted, entries, total, protected)
        assert torch.equal(budgets.sum((0, 2)), total)
        assert (budgets >= protected.view(1, 2, 1)).all()
        assert (budgets <= entries.view(1, 2, 1)).all()
        assert (budgets.sum(-1) - wanted.sum(-1)).abs().max() < 1 + 1e-6
        assert (budgets - wanted).abs().max() < 2


def test_a_layer_is_blind_to_those_after_it_and_not_to_those_before() -> None:
    learned = randomised(LearnedSequentialAllocator(LayerByLayer(), LAYERS, HEADS))
    for held in learned.parameters():
        held.data *= 0.4
    scores, entries, total, protected = prompt(0, 0.3, 300)
    features = attention(0)
    wanted = wishes(learned, scores, total, features)
    budgets = round_in_order(wanted, entries, total, protected)
    for at in range(LAYERS):
        other, told = scores.clone(), features.clone()
        other[at] = torch.where(other[at].isfinite(), other[at].flip(1), other[at])
        told[at] = attention(1)[at]
        new = wishes(learned, other, total, told)
        assert torch.equal(new[:at], wanted[:at])
        assert torch.equal(round_in_order(new, entries, total, protected)[:at], budgets[:at])
        assert not torch.equal(new[at], wanted[at])
        assert all(not torch.equal(new[later], wanted[later]) for later in range(at + 1, LAYERS))


def test_without_the_prompt_layers_share_by_the_softmax_of_learned_weights() -> None:
    learned = LearnedSequentialAllocator(Pyramid(), LAYERS, HEADS, conditioned=False)
    learned.layer_budget.logits.data[:] = torch.tensor([0.3, -0.5, 0.0, 1.0, 0.2])
    learned.head_importance.logits.data[:, 3] = torch.tensor([2.0, 0.0, 0.0])
    scores, entries, total, protected = prompt(0, 0.1, 600)
    wanted = wishes(learned, scores, total, None)
    given = (
        round_to_budget(wishes(Pyramid(), scores, total, None), entries, total, protected).sum(-1) - HEADS * protected
    )
    weight = given * learned.layer_budget.logits[0].exp().unsqueeze(-1)
    expected = weight / weight.sum(0) * (total - LAYERS * HEADS * protected) + HEADS * protected
    torch.testing.assert_close(wanted.sum(-1), expected.double(), rtol=0, atol=0.25)
    assert (wanted[3, :, 0] > 2 * wanted[3, :, 1]).all()
    assert (wanted[3, :, 1] - wanted[3, :, 2]).abs().max() < 1  # of the heuristic, too, one head has an entry more


def test_what_a_layer_cannot_hold_goes_to_later_ones() -> None:
    learned = LearnedSequentialAllocator(Uniform(), LAYERS, HEADS, conditioned=False)
    scores, entries, total, _ = prompt(0, 0.5, 100)
    learned.layer_budget.logits.data[:, 0] = 50.0
    wanted = wishes(learned, scores, total, None).sum(-1)
    torch.testing.assert_close(wanted[0], HEADS * entries.double())
    torch.testing.assert_close(
        wanted[1:], ((total - HEADS * entries) / (LAYERS - 1)).double().expand(4, 2), rtol=0, atol=2
    )
    learned.layer_budget.logits.data[:, 0] = -50.0  # the others can hold 4/5, half is asked for
    learned.layer_budget.logits.data[:, 1] = -50.0
    learned.layer_budget.logits.data[:, 2] = -50.0
    wanted = wishes(learned, scores, total, None).sum(-1)
    torch.testing.assert_close(wanted[3:], (HEADS * entries).double().expand(2, 2))


def test_the_gradient_is_the_slope() -> None:
    learned = randomised(LearnedSequentialAllocator(LayerByLayer(), LAYERS, HEADS)).requires_grad_(True)
    for held in learned.parameters():
        held.data *= 0.5
    scores, _, total, _ = prompt(0, 0.25, 200)
    worth = torch.randn(LAYERS, 2, HEADS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (worth * wishes(learned, scores, total, attention(0))).sum().backward()
    step = 1e-3
    for path, held in learned.named_parameters():
        direction = torch.randn(held.shape, generator=torch.Generator().manual_seed(1))
        slope = []
        start = held.detach().clone()
        with torch.no_grad():
            for by in (step, -step):
                held.copy_(start + by * direction)
                slope.append((worth * wishes(learned, scores, total, attention(0))).sum())
            held.copy_(start)
        measured = (slope[0] - slope[1]) / (2 * step)
        assert measured.abs() > 1e-3, path
        torch.testing.assert_close((held.grad * direction).sum().double(), measured, rtol=2e-2, atol=1e-2, msg=path)


def test_what_needs_later_layers_is_no_base() -> None:
    for base in (AdaKV(), LearnedAllocator(Uniform(), LAYERS, HEADS)):
        with pytest.raises(UserError, match=rf"^base={type(base).__name__}: expected a heuristic that needs no later"):
            LearnedSequentialAllocator(base)
    with pytest.raises(UserError, match=r"^base=AdaKV: expected a heuristic that is static"):
        LayerByLayer(AdaKV())
    scores, _, total, _ = prompt(0, 0.3, 100)
    with pytest.raises(UserError, match="num_layers=2 num_heads=3: the model has 5 and 3"):
        wishes(LearnedSequentialAllocator(Uniform(), 2, HEADS, conditioned=False), scores, total, None)
    assert len(KNOTS) == LearnedSequentialAllocator(Uniform(), 2, HEADS).layer_budget.logits.shape[0]
