"""VaSE: sizes of values, odds, how often entries are drawn, and scores in a sketch."""

import dataclasses
from typing import Any

import numpy as np
import torch

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from support.originals.comparing import assert_kept, assert_scores, kept
from support.originals.loading import Case, inputs_of, observation, policy

DRAWS = 100


class Given(Scorer):
    """Scores as they are given."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, obs: Observation) -> torch.Tensor:
        return self.scores


def candidates(case: Case) -> Observation:
    """The entries before the last ones, which the original keeps in any case, with the queries of these."""
    inputs, rest = inputs_of(case), case.params["residual"]
    keys, values = (inputs[name][:, :, :-rest] for name in ("k", "v"))
    after = torch.arange(keys.shape[2], keys.shape[2] + rest).expand(len(keys), -1)
    share = torch.full((len(keys),), case.params["K"] / keys.shape[2], dtype=torch.float64)
    return observation(inputs["q"][:, :, -rest:], keys, values, query_positions=after, keep=share)


def check_vase(case: Case) -> None:
    {"attn": check_attention, "cur": check_sketch}[case.params["op"]](case)


def check_attention(case: Case) -> None:
    params, obs = case.params, candidates(case)
    base = {"window": params["residual"], "kernel_size": 5, "pooling": "avg"}
    arguments: dict[str, Any] = {"base": {"class_path": "learnkv.scorers.SnapKV", "init_args": base}}
    arguments["large"] = (params["n_large"] + 0.5) / params["K"]
    scorer = policy("vase_decode", scorer=arguments).scorer
    assert_scores(scorer.sizes(obs).numpy(), case["range"])
    odds = case["attn"]
    assert_scores(scorer.base(obs).numpy(), odds)
    # The original counts its first tokens among the largest values.
    wide = obs.values.clone()
    wide[:, :, : params["n_sink"], 0] = 1e6
    obs = dataclasses.replace(obs, values=wide)
    largest, drawn = case["large"], case["drawn"]
    whole = scorer.sizes(obs).topk(params["n_large"]).indices.sort(-1).values
    assert np.array_equal(whole.numpy(), largest)
    base_scorer, scorer.base = scorer.base, Given(torch.from_numpy(odds))
    counts = np.zeros(drawn.shape)
    for seed in range(DRAWS):
        scorer.noise.seed = seed
        mask = kept(scorer(obs), torch.full(obs.valid.shape[:2], params["K"]))
        assert np.take_along_axis(mask, largest, -1).all()
        counts += mask
    scorer.base = base_scorer
    np.put_along_axis(counts, largest, 0, -1)
    shared = (counts + params["draws"] * drawn) / (DRAWS + params["draws"])
    spread = shared * (1 - shared) * (1 / DRAWS + 1 / params["draws"])
    apart = np.square(counts / DRAWS - drawn)[spread > 0] / spread[spread > 0]
    assert 0.85 < apart.mean() < 1.15, "draws with other odds"


def check_sketch(case: Case) -> None:
    params, obs = case.params, candidates(case)
    scorer = policy("vase_dkv", scorer={"rank": params["rank"]}).scorer
    directions = torch.from_numpy(case["G"])
    assert scorer.directions(obs).shape == directions.shape
    scores, golden = scorer.shares(obs, directions), case["scores"]
    assert_scores(scores.numpy(), golden, rtol=1e-3)
    scores[..., : params["n_sink"]] = torch.inf
    ranking = golden.copy()
    ranking[..., : params["n_sink"]] = 1.0
    assert_kept(kept(scores, torch.full(scores.shape[:2], params["K"])), ranking, case["kept"])


FAMILIES = {"vase": check_vase}
