"""Adaptive mass segments: segments, budgets, kept sets and credit of successive evictions."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.policy.budget import Protected
from learnkv.scorers.ams import Credit
from support.originals.comparing import assert_scores, kept
from support.originals.loading import Case, observation, policy, sidecar_of


@dataclass(frozen=True)
class Attended(Observation):
    """An observation whose queries give this attention [B, H, G, Q, S]."""

    weights: Tensor | None = None

    def window_attention(self, window: int) -> tuple[Tensor, Tensor]:
        assert self.weights is not None
        return self.weights[:, :, :, -window:], self.weights[:, :, 0, -window:] > 0


class Given(Scorer):
    """Scores as they are given."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, obs: Observation) -> Tensor:
        return self.scores


def credit_before(case: Case, shape: tuple[int, ...]) -> Tensor:
    """Credit [B, H, S, 1] of the entries that the case before kept, which are the first here."""
    credit = torch.zeros(*shape, 1)
    if case.params["event"]:
        before = sidecar_of(case.path)["cases"][case.number - 1]
        stored = case.of(before["id"])["credit"]
        credit[:, :, : stored.shape[2], 0] = torch.from_numpy(stored)
    return credit


def check(case: Case) -> None:
    params = case.params
    attention, base = torch.from_numpy(case["attn"]), torch.from_numpy(case["base"])
    batch, heads, _ = base.shape
    arguments = {
        "window": params["win"],
        "kernel_size": params["ker"],
        "step": params["sm"],
        "shortest": params["mn"],
        "longest": params["mx"],
        "least": params["mk"],
        "credit": 0.3 if params["credit"] else 0.0,
        "batch": "joint",
    }
    ams = policy("ams_decode", scorer=arguments, replaced={"sinks": params["sink"], "recent": params["last"]})
    scorer, planner = ams.scorer, ams.planner
    scorer.base = None if params["uw"] else Given(base)
    plain = observation(torch.zeros(batch, attention.shape[1], attention.shape[2], 2), *torch.zeros(2, *base.shape, 2))
    obs = Attended(
        **{**vars(plain), "statistics": {Credit(): credit_before(case, base.shape)}},
        weights=attention.unflatten(1, (heads, -1)),
    )
    budget = torch.full((batch, heads), params["t_keep"])
    protected = params["sink"] + params["last"]
    scores = planner.score(obs, Protected.of_edges([protected] * batch)).scores
    assert (scores == torch.inf).sum() == batch * heads * protected
    mass, credit = scorer._mass(obs, budget)
    mass = mass.mean(0) / mass.mean(0).sum(-1, keepdim=True)
    for own, golden in zip(mass, case["segments"], strict=True):
        bounds, counts = scorer.portions(own, torch.tensor(len(own)), torch.tensor(params["t_keep"]))
        segments = zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts.tolist(), strict=True)
        assert [one for one in segments if one[0] < one[1]] == [tuple(row) for row in golden.tolist() if row[0] >= 0]
    mask = kept(planner.refine(obs, scores, budget), budget)
    golden = case["kept"]
    if params["uw"]:  # the last entries share one score: which of them are kept is chance
        assert np.array_equal(mask.sum(-1), np.full((batch, heads), params["t_keep"]))
        same = np.take_along_axis(mask, golden, -1).sum(-1)
        assert (same >= params["t_keep"] - params["W"]).all()
    else:
        assert np.array_equal(mask.nonzero()[2].reshape(golden.shape), golden)
    if params["credit"]:
        carried = scorer.carry(obs, budget)[Credit()].squeeze(-1)
        assert torch.equal(carried, credit)
        assert_scores(np.take_along_axis(carried.numpy(), golden, -1), case["credit"], atol=1e-9)


FAMILIES = {"ams": check}
