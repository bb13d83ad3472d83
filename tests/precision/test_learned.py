"""Learned precision: its start is the uniform precision, its gradients are finite, bad menus are refused."""

import pytest
import torch
from support.models import attached, padded, tokens

from learnkv import CompressedCache, Policy, prefill
from learnkv.allocators import AdaKV, Allocator, LearnedAllocator
from learnkv.errors import UserError
from learnkv.precision import LearnedPrecision, Precision, UniformPrecision
from learnkv.scorers import LearnedScorer, Scorer, SnapKV

LAYERS, HEADS, DIM, LENGTHS = 3, 2, 16, (57, 40)
MENU = ("K3V2", "K4V2", "K4V3", "K8V4")
BUDGETS = [0.08, 0.15, 0.3, 0.5]


def cache_for(policy: Policy) -> CompressedCache:
    return prefill(attached("llama"), *padded([tokens(1, length)[0] for length in LENGTHS]), policies=[policy])


def policy(precision: Precision, allocator: Allocator, scorer: Scorer | None = None) -> Policy:
    return Policy(scorer or SnapKV(window=8), allocator, sinks=2, recent=3, precision=precision)


@pytest.mark.parametrize("init", MENU)
@pytest.mark.parametrize("by", ["scores", "shares"])
@pytest.mark.parametrize("asked", BUDGETS)
def test_it_starts_as_the_uniform_precision(init: str, by: str, asked: float) -> None:
    """Index for index and level for level, with budgets by one ranking and with budgets of each head."""
    allocator = LearnedAllocator(AdaKV(), LAYERS, HEADS, by=by)
    learned = policy(LearnedPrecision(MENU, init, LAYERS, HEADS), allocator)
    uniform = policy(UniformPrecision(int(init[1]), int(init[3])), allocator)
    cache = cache_for(learned)
    got, want = (each.plan(cache, bytes=asked) for each in (learned, uniform))
    assert torch.equal(got.kept, want.kept)
    assert torch.equal(got.chosen, want.chosen * (MENU.index(init) + 1))
    assert got.levels is not None
    assert got.levels.used == [name == init for name in MENU]
    assert learned.compress(cache.fork(), bytes=asked).nbytes == uniform.compress(cache.fork(), bytes=asked).nbytes


def trained(by: str = "scores") -> Policy:
    """One with parameters of all kinds that have moved."""
    torch.manual_seed(0)
    scorer = LearnedScorer(SnapKV(window=8), LAYERS, HEADS, DIM, width=4, window=8, sampling=0.3)
    precision = LearnedPrecision(MENU, "K4V3", LAYERS, HEADS)
    made = policy(precision, LearnedAllocator(AdaKV(), LAYERS, HEADS, by=by), scorer)
    precision.set_distortions(torch.tensor([0.6, 0.3, 0.15, 0.02]))
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.02 * torch.randn_like(weight)
    return made


def test_gradients_reach_every_parameter_and_are_finite_beside_padding() -> None:
    made = trained()
    student = made.relax(cache_for(made), bytes=0.2)
    ids = tokens(2, 6, seed=4)
    logits = attached("llama")(input_ids=ids, past_key_values=student).logits
    logits.log_softmax(-1)[..., 0].mean().backward()
    for name, weight in made.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.abs().max() > 0, name


def test_a_level_that_is_of_no_use_gets_a_gradient_where_others_are_left_out() -> None:
    made = trained()
    precision = made.precision
    assert isinstance(precision, LearnedPrecision)
    precision.set_distortions(torch.tensor([0.6, 0.3, 0.29, 0.02]))  # K4V3 is below the line from K4V2 to K8V4
    cache, ids = cache_for(made), tokens(2, 6, seed=4)

    def gradient() -> torch.Tensor:
        student = made.relax(cache, bytes=0.2)
        loss = attached("llama")(input_ids=ids, past_key_values=student).logits.log_softmax(-1)[..., 0].mean()
        return torch.autograd.grad(loss, precision.log_distortion)[0][..., 2]

    assert gradient().abs().max() == 0
    precision.available = torch.tensor([True, True, True, False]).expand(LAYERS, HEADS, 4)
    assert gradient().abs().max() > 0


@pytest.mark.parametrize("by", ["scores", "shares"])
def test_protected_entries_get_levels_by_their_own_scores(by: str) -> None:
    """Within a head the level never falls while the score rises, whether an entry is protected or not."""
    made = trained(by)
    cache = cache_for(made)
    plan = made.plan(cache, bytes=0.2)
    always, level = plan.scores == torch.inf, plan.chosen
    assert level[always].min() >= 1
    assert level[always].max() > level[always].min()
    assert plan.levels is not None
    assert plan.levels.order is not None
    scores = plan.levels.order.masked_fill(~plan.kept, -torch.inf)
    by_score = scores.argsort(-1)
    rising = scores.gather(-1, by_score).diff() > 0
    assert (level.gather(-1, by_score).diff()[rising] >= 0).all()
    lowest_protected = level.where(always, 9).amin(-1)
    assert (lowest_protected < level.where(~always, 0).amax(-1)).any()


def test_what_training_reads_is_what_the_tiers_hold() -> None:
    """Levels of a plan and entries of each tier of the deployed cache are the same."""
    made = trained()
    cache = cache_for(made)
    plan, compressed = made.plan(cache, bytes=0.2), made.compress(cache.fork(), bytes=0.2)
    assert plan.levels is not None
    used = [number for number, is_used in enumerate(plan.levels.used, 1) if is_used]
    begins = [max(LENGTHS) - length for length in LENGTHS]
    for layer_idx, layer in enumerate(compressed.compressed_layers()):
        for number, tier in zip(used, layer.state.tiers, strict=True):
            for row in range(len(LENGTHS) * HEADS):
                got = tier.row_positions(row)
                slots = (plan.chosen[layer_idx].flatten(0, 1)[row] == number).nonzero().flatten()
                assert torch.equal(got.long(), slots - begins[row // HEADS])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"menu": ("K4V3",)}, "expected two to 5 different levels"),
        ({"menu": ("K4V3", "K4V3")}, "expected two to 5 different levels"),
        ({"menu": ("K4V3", "K5V2")}, "expected 16, 8, 4, 3, 2 bits"),
        ({"menu": ("4,3", "K4V2")}, "expected bits such as 4 or K4V3"),
        ({"init": "K2V2"}, "init=K2V2: expected measured, one of K3V2, K4V2, K4V3, K8V4, or 4 distortions above 0"),
        ({"init": [0.5, 0.1]}, "expected measured, one of K3V2, K4V2, K4V3, K8V4, or 4 distortions above 0"),
        ({"init": [0.5, 0.4, 0.1, 0.0]}, "or 4 distortions above 0"),
    ],
)
def test_what_cannot_be_built_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LearnedPrecision(**{"num_layers": LAYERS, "num_heads": HEADS, **arguments})


def test_it_may_start_with_distortions_of_its_own() -> None:
    precision = LearnedPrecision(MENU, [0.9, 0.35, 0.2, 0.1], LAYERS, HEADS)
    assert precision.measured
    want = torch.tensor([0.9, 0.35, 0.2, 0.1]).expand(LAYERS, HEADS, 4)
    torch.testing.assert_close(precision.distortions(), want)


def test_what_cannot_be_planned_is_named() -> None:
    allocator = LearnedAllocator(AdaKV(), LAYERS, HEADS, by="scores")
    swapped = policy(LearnedPrecision(("K8V4", "K3V2"), "K8V4", LAYERS, HEADS), allocator)
    cache = cache_for(swapped)
    with pytest.raises(UserError, match="ascending order of their bytes"):
        swapped.plan(cache, bytes=0.2)
    with pytest.raises(UserError, match="shares out bytes over entries and levels, expected bytes="):
        policy(LearnedPrecision(MENU, "K4V3", LAYERS, HEADS), allocator).compress(cache, keep=0.2)
    with pytest.raises(UserError, match="measures distortions before the first step"):
        policy(LearnedPrecision(MENU, "measured", LAYERS, HEADS), allocator).plan(cache, bytes=0.2)
    with pytest.raises(UserError, match="num_layers=2 num_heads=2: the model has 3 and 2"):
        policy(LearnedPrecision(MENU, "K4V3", 2, HEADS), allocator).plan(cache, bytes=0.2)


@pytest.mark.parametrize("asked", torch.linspace(0.06, 0.5, 23).tolist())
def test_no_entry_gets_a_level_between_the_corners(asked: float) -> None:
    """The bytes that are left over do not buy a level that has no tier."""
    made = trained()
    precision = made.precision
    assert isinstance(precision, LearnedPrecision)
    precision.set_distortions(torch.tensor([0.95, 0.3, 0.29, 0.02]))
    plan = made.plan(cache_for(made), bytes=asked)
    assert plan.levels is not None
    assert plan.levels.used == [False, True, False, True]
    assert plan.levels.counts[[0, 2]].sum() == 0
    assert torch.equal(plan.levels.counts.sum(0), plan.budgets)
