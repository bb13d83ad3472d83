"""Scorers that correct another's scores, and those that depend on how much will be kept."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.models import attached, tokens
from support.observations import observe

from learnkv import Policy, prefill
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.scorers import CriticalKV, DefensiveKV, Knorm, LearnedScorer, ReSTKV, SnapKV, VaSE


def ranked(scores: torch.Tensor) -> list[int]:
    return scores.argsort(descending=True).tolist()


def test_critical_fills_the_rest_by_what_values_weigh() -> None:
    obs = observe([6], heads=2, group=1, dim=2)
    values = torch.ones(1, 2, 6, 2)
    values[0, :, 4:] = torch.tensor([[9.0, 0.0], [0.0, 7.0]])
    obs = dataclasses.replace(obs, values=values, project=lambda: torch.eye(4))
    base = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0]).expand(1, 2, 6)
    critical = CriticalKV(Knorm(), epsilon=0.5)
    # Weighed: 11, 9, 7, 5, 13.5, 3.5. Half of a budget of 4 is decided by the base alone.
    first, second = critical.refine(obs, base, torch.tensor([[4, 1]]))[0]
    assert ranked(first)[:4] == [0, 1, 4, 2]
    assert ranked(second) == [4, 0, 1, 2, 3, 5]
    spared = CriticalKV(Knorm(), floor=0.8, epsilon=0.5).refine(obs, base, torch.tensor([[4, 1]]))[0]
    assert ranked(spared[1])[:3] == [0, 1, 4]  # 0.8 of a mean budget of 2.5


def test_a_policy_asks_for_the_second_stage_with_each_heads_budget() -> None:
    model = attached("llama")
    policy = Policy(CriticalKV(SnapKV(window=8)), sinks=1, recent=2)
    cache = prefill(model, tokens(1, 60), policies=[policy])
    for keep in (0.2, 0.5):
        small = policy.compress(cache.fork(), keep=keep)
        assert small.budgets.unique().tolist() == [round(60 * keep)]
        once = prefill(model, tokens(1, 60), policy=policy, keep=keep)
        for at, layer in enumerate(cache.compressed_layers()):
            obs = layer.observation()
            scores = policy.scorer.base(obs)
            scores[..., [0, 58, 59]] = torch.inf
            weighed = policy.scorer.contributions(obs) * (scores + 1e-4)
            for head in range(2):
                best = ranked(scores[0, head])[: round(60 * keep) // 2]
                rest = [one for one in ranked(weighed[0, head]) if one not in best]
                want = sorted(best + rest[: round(60 * keep) - len(best)])
                assert small.kept_positions(at, 0, head).tolist() == want
                assert once.kept_positions(at, 0, head).tolist() == want


def test_a_model_that_hides_its_output_projection_is_named() -> None:
    obs = dataclasses.replace(observe([20]), project=None)
    for ask in (lambda: DefensiveKV()(obs), lambda: CriticalKV(Knorm()).contributions(obs)):
        with pytest.raises(UserError, match="reads the output projection"):
            ask()


@pytest.mark.parametrize("scorer", [DefensiveKV(), VaSE(Knorm()), ReSTKV()])
def test_scores_that_depend_on_the_budget_are_not_asked_for_without_one(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="depend on how much will be kept"):
        scorer(dataclasses.replace(observe([20]), keep=None))


@pytest.mark.parametrize("wrapper", [CriticalKV, VaSE, lambda base: LearnedScorer(base, 2, 2, 16)])
def test_nothing_is_built_on_a_scorer_that_needs_a_budget(wrapper: Callable[..., Any] | type[Any]) -> None:
    with pytest.raises(UserError, match=r"base=CriticalKV: ranks by a head's budget"):
        wrapper(CriticalKV(Knorm()))


def test_vase_keeps_large_values_and_draws_the_rest() -> None:
    obs = observe([400], heads=2)
    obs = dataclasses.replace(obs, values=obs.values.index_fill(2, torch.tensor([7, 300]), 50.0))
    obs = dataclasses.replace(obs, keep=torch.tensor([0.05], dtype=torch.float64))
    still, drawn, other = (VaSE(Knorm(), large=0.1, temperature=t, seed=s)(obs) for t, s in ((0, 0), (1, 0), (1, 1)))
    for scores in (still, drawn, other):
        assert all(sorted(ranked(head)[:2]) == [7, 300] for head in scores[0])  # a tenth of 20 entries
    assert [one for one in ranked(still[0, 0]) if one not in (7, 300)] == [
        one for one in ranked(Knorm()(obs)[0, 0]) if one not in (7, 300)
    ]
    # Noise with pi/sqrt(6) standard deviations beside scores of one: 0.61 and its square, up to chance.
    rest = torch.ones(400, dtype=torch.bool).index_fill(0, torch.tensor([7, 300]), False)
    order = [
        float(torch.corrcoef(torch.stack([a[..., rest].flatten(), b[..., rest].flatten()]))[0, 1])
        for a, b in ((still, drawn), (drawn, other))
    ]
    assert order == pytest.approx([0.61, 0.38], abs=0.08)


def test_defensive_scores_still_rank_where_the_budget_is_smaller_than_the_window() -> None:
    obs = dataclasses.replace(observe([200], window=32), keep=torch.tensor([0.05], dtype=torch.float64))
    parts = DefensiveKV()(obs), DefensiveKV(variant="original")(obs)
    tied = [int((scores == scores.amax()).sum(-1).max()) for scores in parts]
    assert tied[0] <= 6  # half of ten entries, and the best
    assert tied[1] > 100
