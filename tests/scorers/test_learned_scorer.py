"""The learned scorer: the heuristic's order at the start, a network per layer and head afterwards."""

import dataclasses
import math

import pytest
import torch
from support.observations import observe

from learnkv.allocators import AdaKV
from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.window_scores import window_scores
from learnkv.scorers import Constant, CriticalKV, Knorm, LearnedScorer, SnapKV, StreamingLLM


def learned(base: Scorer, **more: float) -> LearnedScorer:
    torch.manual_seed(0)
    return LearnedScorer(base, num_layers=2, num_heads=2, head_dim=16, width=4, window=8, **more)


@pytest.mark.parametrize("base", [SnapKV(window=8), Knorm(), StreamingLLM()], ids=lambda one: type(one).__name__)
def test_at_the_start_every_order_is_the_heuristics(base: Scorer) -> None:
    obs = observe([200, 60])
    scores, prior = learned(base)(obs), base(obs)
    for row in range(2):
        valid = obs.valid[row]
        got, want = scores[row][valid], prior[row][valid]  # both heads together: allocators compare them
        order = want.argsort(stable=True)
        assert torch.equal((got[order].diff() > 0), (want[order].diff() > 0))
        assert (got[order].diff() >= 0).all()


def test_adakv_splits_learned_scores_as_it_splits_the_heuristics() -> None:
    base, obs = SnapKV(window=8), observe([200, 60])
    learnt = learned(base)
    budget = torch.tensor([20.0, 9.0], dtype=torch.float64)
    split = [AdaKV()(one(obs).masked_fill(~obs.valid, -torch.inf).unsqueeze(0), None, budget) for one in (learnt, base)]
    assert torch.equal(*split)
    assert not torch.equal(split[0][..., 0], split[0][..., 1])


def test_the_correction_is_that_of_the_layer_and_head() -> None:
    scorer, obs = learned(Knorm()), observe([30], layer_idx=1)
    before = scorer(obs)
    scorer.weight_out.data[1, 0] = 1.0
    moved = (scorer(obs) - before).abs().amax(-1)[0]
    assert moved[0] > 0.1
    assert moved[1] == 0
    assert torch.equal(scorer(dataclasses.replace(obs, layer_idx=0)), before)


def test_the_correction_sees_key_value_and_attention() -> None:
    scorer, obs = learned(Knorm()), observe([30])
    scorer.weight_out.data[:] = 1.0
    before = scorer(obs)
    for name in ("values", "queries"):
        other = torch.randn(getattr(obs, name).shape, generator=torch.Generator().manual_seed(5))
        assert not torch.allclose(scorer(dataclasses.replace(obs, **{name: other})), before)
    louder = dataclasses.replace(obs, values=7 * obs.values)  # of entries their direction counts, not their size
    torch.testing.assert_close(scorer(louder), before, rtol=1e-4, atol=1e-4)


def test_attention_is_that_of_query_heads_on_average_and_of_the_one_that_gives_most() -> None:
    obs = observe([90, 40], group=3)
    found = learned(Knorm())._attention(obs)
    places = (obs.query_positions, obs.positions, obs.valid)
    for at, how in enumerate(("mean", "max")):
        asked = dict(zip(("query_positions", "positions", "valid"), places, strict=True), group_reduce=how)
        given = window_scores(obs.queries, obs.keys, scaling=obs.scaling, kernel_size=1, **asked)
        even = obs.valid.sum(-1, keepdim=True)
        torch.testing.assert_close(found[..., at], (given * even).clamp_min(1e-5).log() / 5)
        near = [given[..., max(j - 3, 0) : j + 4].sum(-1) / 7 for j in range(90)]
        torch.testing.assert_close(found[..., 2 + at], (torch.stack(near, -1) * even).clamp_min(1e-5).log() / 5)


def test_the_gradient_reaches_the_network_and_not_the_heuristic() -> None:
    scorer, obs = learned(SnapKV(window=8)), observe([30])
    scorer(obs).square().sum().backward()
    assert scorer.weight_out.grad[1].abs().max() > 0
    assert scorer.weight_out.grad[0].abs().max() == 0
    assert list(scorer.base.parameters()) == []


def test_it_is_small() -> None:
    """At most 3 % of a model with 6 layers, 4 kv heads of 32 dimensions and 3 million parameters."""
    scorer = LearnedScorer(SnapKV(), num_layers=6, num_heads=4, head_dim=32)
    assert sum(parameter.numel() for parameter in scorer.parameters()) < 0.03 * 3e6


def test_a_policy_for_another_model_is_named() -> None:
    with pytest.raises(UserError, match="num_layers=2 num_heads=2: the model has layer 1 with 4"):
        learned(Knorm())(observe([30], heads=4))


def test_a_head_whose_hidden_units_died_still_learns() -> None:
    scorer, obs = learned(Knorm()), observe([30])
    before = scorer(obs).detach()
    scorer.bias.data[:] = -1e3
    scorer.weight_out.data[:] = 1.0
    assert torch.equal(scorer(obs), before)
    scorer(obs)[..., :10].sum().backward()
    assert scorer.weight_out.grad.eq(0).all()
    assert scorer.weight_in.grad.eq(0).all()
    scorer.weight_direct.data += 0.01 * scorer.weight_direct.grad
    moved = scorer(obs) - before
    assert moved[..., :10].sum() > 1


def drawn(scorer: LearnedScorer, obs: Observation) -> torch.Tensor:
    """What decides within heads, [B, H, S]."""
    return scorer.refine(obs, scorer(obs), torch.zeros(obs.valid.shape[:2], dtype=torch.long))


def test_sampling_draws_entries_in_proportion_to_the_exponential_of_their_scores() -> None:
    noise = drawn(learned(Constant(), sampling=1.0), observe([20_000])).detach()[0]
    assert noise.isfinite().all()
    ahead = noise[:, ::2] + math.log(3) > noise[:, 1::2]
    assert ahead.float().mean() == pytest.approx(0.75, abs=0.015)  # 20,000 pairs: five standard errors
    for least in (0.0, 1.0, 3.0):
        expected = 1 - math.exp(-math.exp(-least))
        assert (noise > least).float().mean().item() == pytest.approx(expected, abs=0.013)
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.04  # each head has a sample of its own


def test_sampling_is_a_function_of_layer_head_and_position() -> None:
    scorer, obs = learned(Constant(), sampling=2.0), observe([90, 40])
    both = drawn(scorer, obs)
    torch.testing.assert_close(both[1, :, 50:], drawn(scorer, observe([40]))[0])
    assert torch.equal(both[0], drawn(scorer, observe([90, 40], seed=3))[0])
    assert not torch.equal(both[0], drawn(scorer, dataclasses.replace(obs, layer_idx=0))[0])
    torch.testing.assert_close(both[0], 2 * drawn(learned(Constant(), sampling=1.0), obs)[0])


def test_sampling_decides_within_heads_and_not_on_their_budgets() -> None:
    obs = observe([30])
    plain, sampled = learned(SnapKV(window=8)), learned(SnapKV(window=8), sampling=0.5)
    for scorer in (plain, sampled):
        scorer.weight_out.data[:] = 1.0
    assert torch.equal(plain(obs), sampled(obs))
    noise = drawn(learned(Constant(), sampling=0.5), obs)
    torch.testing.assert_close(drawn(sampled, obs), plain(obs) + noise)
    assert torch.equal(drawn(plain, obs), plain(obs))


def test_each_head_learns_its_scale_and_what_it_samples_from() -> None:
    scorer, obs = learned(Constant(), sampling=1.0), observe([30])
    noise = drawn(scorer, obs).detach()
    (drawn(scorer, obs) * noise)[0, 0].sum().backward()
    found = scorer.sampling_growth.grad[..., 0]
    torch.testing.assert_close(found[1, 0], 30 * noise[0, 0].square().sum())
    assert found.count_nonzero() == 1
    assert scorer.weight_out.grad[1].abs().max() > 0
    scorer.sampling_growth.data[1, 0] = math.log(4) / 30
    torch.testing.assert_close(drawn(scorer, obs)[0, 0], 4 * noise[0, 0])
    assert torch.equal(drawn(scorer, obs)[0, 1], noise[0, 1])


@pytest.mark.parametrize("sampling", [-1.0, math.nan, math.inf])
def test_a_scale_that_is_none_is_named(sampling: float) -> None:
    with pytest.raises(UserError, match=f"sampling={sampling}"):
        learned(Knorm(), sampling=sampling)


def test_scores_that_sampling_changes_are_no_base_for_others() -> None:
    CriticalKV(learned(Knorm()))
    with pytest.raises(UserError, match="base=LearnedScorer"):
        CriticalKV(learned(Knorm(), sampling=1.0))
