"""The planner needs observations, lengths and budgets; no cache."""

import pytest
import torch
from support.models import attached, padded, tokens
from support.observations import observe

from learnkv import Policy, prefill
from learnkv.allocators import CAKE, AdaKV, LearnedAllocator, Uniform
from learnkv.core.allocator import Allocator
from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.policy.budget import Protected
from learnkv.policy.planner import Planner, with_keep
from learnkv.scorers import CriticalKV, Knorm, SnapKV, VaSE

LENGTHS, LAYERS, HEADS = [40, 25], 3, 2
TOTALS, PROTECTED = [60, 31], Protected.of_edges([4, 2])


def observations() -> list[Observation]:
    return [observe(LENGTHS, layer_idx=layer, seed=layer) for layer in range(LAYERS)]


@pytest.mark.parametrize("scorer", [Knorm(), SnapKV(window=8), VaSE(Knorm()), CriticalKV(SnapKV(window=8))])
@pytest.mark.parametrize("allocator", [Uniform(), AdaKV(), CAKE(window=8)])
def test_a_plan_spends_the_budget_and_protects(scorer: Scorer, allocator: Allocator) -> None:
    planner = Planner(scorer, allocator, sinks=2, recent=3)
    plan = planner.plan(observations(), LENGTHS, TOTALS, PROTECTED)
    assert plan.budgets.sum((0, 2)).tolist() == TOTALS
    assert plan.total == sum(TOTALS)
    assert torch.equal(plan.kept.sum(-1), plan.budgets)
    for row, (length, protected) in enumerate(zip(LENGTHS, PROTECTED.edges, strict=True)):
        assert plan.budgets[:, row].min() >= protected
        always = (plan.raw_scores[:, row] == torch.inf).nonzero()[:, -1].unique() - (max(LENGTHS) - length)
        recent = min(3, protected)
        assert always.tolist() == [*range(protected - recent), *range(length - recent, length)]


def test_fixed_rows_keep_their_budgets() -> None:
    planner, fixed = Planner(Knorm(), AdaKV(), 2, 3), torch.full((LAYERS, 2, HEADS), 7)
    first, second = ([flag, not flag] for flag in (True, False))
    free = planner.plan(observations(), LENGTHS, TOTALS, PROTECTED)
    for is_fixed in (first, second):
        plan = planner.plan(observations(), LENGTHS, TOTALS, PROTECTED, fixed, is_fixed)
        for row in (0, 1):
            assert torch.equal(plan.budgets[:, row], (fixed if is_fixed[row] else free.budgets)[:, row])
    plan = planner.plan(observations(), LENGTHS, [42, 42], PROTECTED, fixed, [True, True])
    assert torch.equal(plan.budgets, fixed)
    assert torch.equal(plan.wanted, fixed.double())


def test_scorers_get_the_fraction_that_is_kept() -> None:
    obs = with_keep(observations()[0], LENGTHS, TOTALS, LAYERS)
    assert obs.keep.tolist() == [60 / (40 * 6), 31 / (25 * 6)]


def test_it_is_the_policys() -> None:
    policy = Policy(SnapKV(window=8), LearnedAllocator(AdaKV(), LAYERS, HEADS, by="scores"), sinks=2, recent=3)
    cache = prefill(attached("llama"), *padded([tokens(1, n)[0] for n in LENGTHS]), policies=[policy])
    cache.seal()
    totals, protected = policy.totals(cache, 0.3, None)
    layers = [layer.observation() for layer in cache.compressed_layers()]
    plan, want = policy.planner.plan(layers, LENGTHS, totals, protected), policy.plan(cache, keep=0.3)
    assert torch.equal(plan.budgets, want.budgets)
    assert torch.equal(plan.scores, want.scores)
