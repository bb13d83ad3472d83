"""DefensiveKV and LayerDefensiveKV: the largest attention instead of the mean, and one ranking over heads or layers."""

import json
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from learnkv.policy.policy import Policy
from learnkv.scorers.defensivekv import Parts
from support.originals.comparing import assert_best, assert_scores, kept
from support.originals.loading import Case, policy, whole

RTOL = 1e-3


def scored_parts(case: Case, name: str, scale: float) -> tuple[Policy, Parts]:
    params = case.params
    arguments = {"window": params["window"], "kernel_size": params["kernel"], "variant": "original"}
    made = policy(name, scorer=arguments | {"mass": params.get("mass_threshold", 0.9)})
    keep = torch.tensor([1 - params["compression_ratio"]], dtype=torch.float64)
    obs = whole(case, made, scale)
    return made, made.scorer.parts(whole(case, made, scale, keep=keep.expand(len(obs.keys))))


def check_parts(case: Case, parts: Iterable[Parts], pathological: bool) -> np.ndarray:
    """Golden scores after all steps have been compared; `parts` of one layer, or of several with one row each."""
    stacked = {name: torch.cat([getattr(one, name) for one in parts]).numpy() for name in vars(next(iter(parts)))}
    golden = case["scores"]
    past = golden.shape[-1] - case.params["window"]
    outputs = {"ave": "average", "defensive": "defensive", "value_factor": "factor"}
    for output, name in outputs.items():
        if output in case:
            assert_scores(stacked[name][..., :past], case[output], rtol=RTOL)
    bias = case["window_bias"]
    assert_scores(stacked["bias"][: len(bias)], bias, rtol=RTOL)
    assert np.array_equal(stacked["promoted"][..., :past], case["stage1_mask"].astype(bool))
    if "stage1_count" in case:
        assert np.array_equal(stacked["count"], case["stage1_count"]) or pathological
    assert_scores(stacked["scores"], golden, rtol=RTOL)
    return golden


def assert_chosen(mine: np.ndarray, golden: np.ndarray, places: list[np.ndarray], number: int) -> None:
    """`mine` [H, T] and the golden places of each head are both among the best `number` of golden scores [H, T]."""
    theirs = np.zeros_like(mine)
    for head, at in enumerate(places):
        theirs[head, at[at >= 0]] = True
    for mask in (mine, theirs):
        assert_best(mask.flatten(), golden.flatten(), number)


def check_defensivekv(case: Case) -> None:
    pathological = "pathological" in json.dumps(case.notes)
    made, parts = scored_parts(case, "defensivekv", case.params.get("q_scale", 1.0))
    golden = check_parts(case, [parts], pathological)
    if pathological:  # which of many ties are kept is unspecified
        return
    total, lengths, places = case.params["n_kept_total"], case["head_lens"], case["kept"]
    scores = parts.scores
    budget = torch.full((len(scores),), total / scores.shape[1], dtype=torch.float64)
    wanted = made.allocator(scores.unsqueeze(0), None, budget)[0].round().long()
    assert wanted.sum(-1).tolist() == [total] * len(scores)
    if not case.notes["rows_with_exact_boundary_tie"]:
        assert np.array_equal(wanted, lengths)
    for row, mask in enumerate(kept(scores, wanted)):
        assert_chosen(mask, golden[row], list(places[row]), total)


def check_layer_defensivekv(case: Case) -> None:
    params = case.params
    every: list[tuple[Policy, Parts]] = [
        scored_parts(case, "layer_defensivekv", scale) for scale in params["layer_scale"]
    ]
    golden = check_parts(case, [parts for _, parts in every], pathological=False)
    scores: Tensor = torch.stack([parts.scores for _, parts in every])  # [L, 1, H, T]
    layers, _, heads, _ = scores.shape
    total, lengths, budgets = params["n_kept_total"], case["head_lens"], case["layer_budgets"]
    budget = torch.tensor([total / (layers * heads)], dtype=torch.float64)
    wanted = every[0][0].allocator(scores, None, budget).long()
    if not case.notes["rows_with_exact_boundary_tie"]:
        assert np.array_equal(wanted[:, 0], lengths)
        assert wanted.sum((1, 2)).tolist() == budgets.tolist()
    places = [
        at
        for layer in range(layers)
        for at in (case[f"kept_l{layer}"] if f"kept_l{layer}" in case else np.full((heads, 1), -1))
    ]
    mask = np.concatenate([kept(one, number)[0] for one, number in zip(scores, wanted, strict=True)])
    assert_chosen(mask, golden.reshape(mask.shape), places, total)


FAMILIES = {"defensivekv": check_defensivekv, "layerdefensivekv": check_layer_defensivekv}
