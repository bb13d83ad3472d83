"""Moments of queries in chunks, and scores from moments that were measured before."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.observations import observe
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.policy.policy import Policy
from learnkv.scorers import ExpectedAttention, SnapKV
from learnkv.scorers.query_moments import QueryMoments


def cut(obs: Observation, begin: int, end: int) -> Observation:
    """Entries up to `end` with the queries from `begin` on."""
    held = {name: getattr(obs, name)[:, :, :end] for name in ("keys", "values", "valid", "positions")}
    at = {"queries": obs.queries[:, :, begin:end], "query_positions": obs.query_positions[:, begin:end]}
    return dataclasses.replace(obs, rotation=None, **held, **at)


@pytest.mark.parametrize("ends", [[50], [1, 2, 3, 50], [20, 50], [7, 30, 49, 50]])
def test_moments_do_not_depend_on_the_chunks(ends: list[int]) -> None:
    obs = observe([50, 31], window=50)
    obs = dataclasses.replace(obs, queries=obs.queries + 30)  # a common part beside which the rest is small
    moments, gathered, begin = QueryMoments(sinks=4), None, 0
    for end in ends:
        gathered = moments.update(cut(obs, begin, end), gathered)
        begin = end
    mean, covariance = moments.moments(dataclasses.replace(obs, statistics={moments: gathered}))
    for row, length in enumerate([50, 31]):
        queries = obs.queries[row, :, -length + 4 :].double()
        torch.testing.assert_close(mean[row], queries.mean(1).float())
        theirs = torch.stack([torch.cov(head.T, correction=0) for head in queries]).float()
        torch.testing.assert_close(covariance[row], theirs, rtol=1e-4, atol=1e-5)


def test_measured_moments_take_the_place_of_the_prompts(tmp_path: Path) -> None:
    own = ExpectedAttention()
    obs = observe([40], statistics=own.statistics)
    mean, covariance = own.statistics and next(iter(own.statistics)).moments(obs)
    file = tmp_path / "moments.safetensors"
    layers = {
        "mean": torch.stack([0 * mean[0], mean[0]]),
        "covariance": torch.stack([0 * covariance[0], covariance[0]]),
    }
    save_file(layers, file)
    measured = ExpectedAttention(moments=str(file))
    assert not measured.statistics
    bare = dataclasses.replace(obs, statistics={})
    torch.testing.assert_close(measured(bare), own(obs))
    assert not torch.allclose(measured(dataclasses.replace(bare, layer_idx=0)), own(obs))
    with pytest.raises(UserError, match=r"moments=.*made for 2 layers of 6 heads of 16, layer 1 .* has 12 of 16"):
        measured(observe([40], heads=4))


@pytest.mark.parametrize("held", [{}, {"mean": torch.zeros(2, 6, 16)}])
def test_a_file_of_something_else_is_named(held: dict[str, Tensor], tmp_path: Path) -> None:
    file = tmp_path / "moments.safetensors"
    save_file(held, file)
    with pytest.raises(UserError, match=r"expected (mean of shape \[L, N, D\]|covariance)"):
        ExpectedAttention(moments=str(file))


def test_without_covariance_only_the_mean_counts() -> None:
    scorer = ExpectedAttention(covariance=False, value_norm=False, sinks=0)
    obs = observe([20], statistics=scorer.statistics)
    mean = obs.statistics[QueryMoments(0)][0, :, :, 0]  # [H, G, D]
    logits = torch.einsum("hgd,hsd->hgs", mean, obs.keys[0]) * obs.scaling
    torch.testing.assert_close(scorer(obs)[0], logits.softmax(-1).mean(1))


def test_sinks_come_first() -> None:
    scorer = ExpectedAttention(sinks=4)
    scores = scorer(observe([20, 3], statistics=scorer.statistics))
    assert scores[0, :, :4].amin() > scores[0, :, 4:].amax()
    assert scores.isfinite()[1, :, -3:].all()


def test_tokens_after_the_prompt_are_not_scored_by_it() -> None:
    for scorer in (ExpectedAttention(), ExpectedAttention(covariance=False)):
        with pytest.raises(UserError, match=r"evict_interval=8: ExpectedAttention reads of a prompt what is not held"):
            Policy(scorer, evict_interval=8)
        Policy(scorer, evict_interval=8, decode=SnapKV())
