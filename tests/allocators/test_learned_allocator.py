"""Learned budgets: the heuristic's own integers at the start, exact afterwards, one set per kept fraction."""

import pytest
import torch
from support.observations import observe
from torch import Tensor

from learnkv.allocators import AdaKV, LearnedAllocator, Pyramid, Uniform
from learnkv.allocators.conditioning import KNOTS, attention_features, interpolation_weights
from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_to_budget
from learnkv.scorers import SnapKV

LAYERS, HEADS = 4, 3


def prompt(seed: int, keep: float, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores [L, B, H, S] of two rows, the second one padded, with entries, total and protected of each row."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(LAYERS, 2, HEADS, slots, generator=generator) ** 3
    entries = torch.tensor([slots, slots - 5])
    scores[:, 1, :, :5] = -torch.inf
    total = torch.round(keep * entries * LAYERS * HEADS).long()
    protected = (total // (2 * LAYERS * HEADS)).clamp(max=12)
    for row in range(2):
        scores[:, row, :, slots - int(protected[row]) :] = torch.inf
    return scores, entries, total, protected


def budgets(allocator: Allocator, seed: int, keep: float, slots: int, features: Tensor | None = None) -> Tensor:
    scores, entries, total, protected = prompt(seed, keep, slots)
    return round_to_budget(allocator(scores, features, total / (LAYERS * HEADS)), entries, total, protected)


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("base", [Uniform(), Pyramid(), AdaKV(), AdaKV(Pyramid(), floor=0.0)], ids=str)
def test_at_the_start_the_budgets_are_the_heuristics_to_the_entry(base: Allocator, conditioned: bool) -> None:
    learned = LearnedAllocator(base, LAYERS, HEADS, conditioned=conditioned)
    features = torch.rand(LAYERS, 2, HEADS, 3) if conditioned else None
    for seed in range(40):
        keep, slots = 0.03 + 0.023 * seed, 40 + 37 * seed
        assert torch.equal(budgets(learned, seed, keep, slots, features), budgets(base, seed, keep, slots)), seed


@pytest.mark.parametrize("keep", [0.02, 0.13, 0.6, 1.0])
def test_learned_budgets_spend_the_same_and_follow_their_logits(keep: float) -> None:
    learned = LearnedAllocator(Uniform(), LAYERS, HEADS)
    learned.head_importance.logits.data[:, 2, 1] = 3.0
    learned.layer_budget.logits.data[:, 0] = -2.0
    scores, entries, total, protected = prompt(0, keep, 600)
    wanted = learned(scores, None, total / (LAYERS * HEADS))
    torch.testing.assert_close(wanted.sum((0, 2)), total.double(), rtol=1e-9, atol=0)
    assert (wanted >= protected.view(1, 2, 1) - 1e-6).all()
    assert (wanted <= entries.view(1, 2, 1) + 1e-6).all()
    if keep < 1:
        assert (wanted[2, :, 1] == wanted.amax((0, 2))).all()
        assert (wanted[0].amax(-1) < wanted[1:].amin((0, 2))).all()


def test_only_the_named_parameters_decide() -> None:
    """A constant for all heads of a layer is no head importance, a constant for all layers no layer budget."""
    learned, plain = (LearnedAllocator(Uniform(), LAYERS, HEADS) for _ in range(2))
    learned.head_importance.logits.data += torch.randn(len(KNOTS), LAYERS, 1)
    learned.layer_budget.logits.data += torch.randn(len(KNOTS), 1)
    torch.testing.assert_close(*(one(*_call(0.2)) for one in (learned, plain)), rtol=1e-6, atol=0)


def _call(keep: float) -> tuple[Tensor, None, Tensor]:
    scores, _, total, _ = prompt(1, keep, 300)
    return scores, None, total / (LAYERS * HEADS)


def test_one_set_of_budgets_per_kept_fraction_with_straight_lines_between() -> None:
    basis = interpolation_weights(torch.tensor([*KNOTS, 0.001, 0.9, 0.1 * 2**0.5]))
    torch.testing.assert_close(basis[: len(KNOTS)], torch.eye(len(KNOTS)))
    assert torch.equal(basis[[6, 7]], torch.eye(len(KNOTS))[[0, -1]])
    torch.testing.assert_close(basis[8], torch.tensor([0, 0, 0.5, 0.5, 0, 0]))

    learned, base = LearnedAllocator(Uniform(), LAYERS, HEADS), Uniform()
    learned.layer_budget.logits.data[2] = torch.tensor([4.0, 2.0, -2.0, -4.0])  # the knot at 0.1
    assert torch.equal(budgets(learned, 0, 0.05, 400), budgets(base, 0, 0.05, 400))
    assert budgets(learned, 0, 0.1, 400)[0].sum() > 3 * budgets(learned, 0, 0.1, 400)[3].sum()


def test_the_gradient_is_the_marginal_value_of_a_slot() -> None:
    learned = LearnedAllocator(Uniform(), LAYERS, HEADS, conditioned=True)
    features = torch.rand(LAYERS, 2, HEADS, 3, generator=torch.Generator().manual_seed(0))
    scores, _, total, _ = prompt(0, 0.2, 200)
    worth = torch.zeros(LAYERS, 1, HEADS)
    worth[1, 0, 2] = 1.0  # only slots of this head are worth anything
    (worth * learned(scores, features, total / (LAYERS * HEADS))).sum().backward()
    layer, head = learned.layer_budget.logits.grad.sum(0), learned.head_importance.logits.grad.sum(0)
    assert layer.argmax() == 1
    assert (layer > 0).tolist() == [False, True, False, False]
    torch.testing.assert_close(layer.sum(), torch.tensor(0.0), atol=1e-4, rtol=0)
    assert (head[1] > 0).tolist() == [False, False, True]
    torch.testing.assert_close(head.sum(-1), torch.zeros(LAYERS), atol=1e-4, rtol=0)
    assert learned.head_importance.conditioner.out.weight.grad.abs().max() > 0
    assert learned.layer_budget.conditioner.out.weight.grad.abs().max() > 0


def test_attention_features_of_known_attention() -> None:
    obs = observe([50, 30], window=8, heads=2, group=3)
    features = attention_features(obs, 8)
    attention = SnapKV(window=8, kernel_size=1)(obs)[1, 0][obs.valid[1, 0]]
    share = attention / attention.sum()
    entropy = -(share * share.log()).sum() / torch.tensor(30.0).log()
    expected = torch.stack([entropy, share.topk(2).values.sum(), share[:4].sum()])
    torch.testing.assert_close(features[1, 0], expected, rtol=1e-4, atol=1e-5)
    assert ((features >= 0) & (features <= 1)).all()


def test_conditioned_budgets_depend_on_the_prompt_and_static_ones_say_that_they_do_not() -> None:
    assert LearnedAllocator(Uniform(), LAYERS, HEADS).static
    assert not LearnedAllocator(AdaKV(), LAYERS, HEADS).static
    learned = LearnedAllocator(Uniform(), LAYERS, HEADS, conditioned=True, window=8)
    assert (learned.static, learned.window) == (False, 8)
    for conditioner in (learned.head_importance.conditioner, learned.layer_budget.conditioner):
        torch.nn.init.normal_(conditioner.out.weight)
    one, other = (
        budgets(learned, 0, 0.2, 200, torch.rand(LAYERS, 2, HEADS, 3, generator=torch.Generator().manual_seed(seed)))
        for seed in (0, 1)
    )
    assert not torch.equal(one, other)


def test_a_policy_for_another_model_is_named() -> None:
    with pytest.raises(UserError, match="num_layers=2 num_heads=3: the model has 4 and 3"):
        LearnedAllocator(Uniform(), 2, HEADS)(*_call(0.2))
