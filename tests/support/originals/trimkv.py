"""TrimKV and DBTrimKV: scores from given retention, kept sets, and attention to faded entries."""

import math

import numpy as np
import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.ops.retention_attention import retention_attention
from learnkv.policy.budget import Protected
from learnkv.policy.policy import Policy
from support.originals.comparing import assert_scores, kept
from support.originals.loading import Case, observation, policy


def observed(case: Case, policy: Policy) -> list[Observation]:
    """Layers whose tokens have the case's retention."""
    name = case.params["inputs"]
    retention, keys = (torch.from_numpy(case.shared[f"{name}_{part}"]) for part in ("log_beta", "k"))
    layers = []
    for layer_idx, own in enumerate(keys.unsqueeze(1)):
        statistics = {policy.scorer._features: retention[layer_idx, None, :, :, None]}
        queries = torch.zeros(1, own.shape[1], 0, own.shape[3])
        layers.append(observation(queries, own, own, layer_idx=layer_idx, statistics=statistics))
    return layers


def scores_of(policy: Policy, layers: list[Observation], protected: int = 0) -> Tensor:
    """[L, 1, H, T]."""
    return torch.stack([policy.planner.score(obs, Protected.of_edges([protected])).scores for obs in layers])


def check_kept(scores: Tensor, counts: Tensor, golden: np.ndarray) -> None:
    """Kept sets [L, H, C], -1 where there is none."""
    for mask, positions in zip(
        kept(scores, counts)[:, 0].reshape(-1, scores.shape[-1]), golden.reshape(-1, golden.shape[-1]), strict=True
    ):
        assert mask.nonzero()[0].tolist() == positions[positions >= 0].tolist()


def check(case: Case) -> None:
    if case.params.get("op") == "gated_attention":
        check_attention(case)
        return
    params = case.params
    scorer = {"key_norm": params["strategy"].startswith("knorm")}
    if params["cache"] == "per_head":
        window = params["sliding_window"]
        trimkv = policy("trimkv", scorer=scorer, replaced={"sinks": 0, "recent": window})
        scores = scores_of(trimkv, observed(case, trimkv), window)
        counts = torch.full(scores.shape[:-1], params["memory_size"])
    else:
        trimkv = policy("dbtrimkv", scorer=scorer, **allocator_of(params))
        scores = scores_of(trimkv, observed(case, trimkv))
        budget = torch.tensor([float(params.get("memory_size", 1))])
        counts = trimkv.allocator(scores, None, budget).long()
        if "floor_fixed_len" in case:
            fixed = policy("dbtrimkv", allocator={"floor": params["floor_budget_ratio"]})
            assert fixed.allocator(scores, None, budget)[:, 0].tolist() == case["floor_fixed_len"].tolist()
    assert counts[:, 0].tolist() == case["kept_len"].tolist()
    check_kept(scores, counts, case["kept"])


def allocator_of(params: dict[str, object]) -> dict[str, object]:
    """Changes to the YAML's allocator."""
    if str(params["strategy"]).endswith("threshold"):
        level = math.log(params["alpha_threshold"])
        threshold = {"class_path": "learnkv.allocators.Threshold", "init_args": {"level": level}}
        return {"replaced": {"allocator": threshold}}
    return {"allocator": {"floor": params["floor_budget_ratio"], "rounding": "trimkv"}}


def check_attention(case: Case) -> None:
    name, layer = case.params["inputs"], case.params["layer"]
    retention, keys = (torch.from_numpy(case.shared[f"{name}_{part}"])[layer, None] for part in ("log_beta", "k"))
    queries, values = (torch.from_numpy(case[part]).unsqueeze(0) for part in ("q", "v"))
    assert queries.shape[1] == case.params["group"] * keys.shape[1]
    got = retention_attention(queries, keys, values, retention, keys.shape[-1] ** -0.5, on="logit")
    assert_scores(got.transpose(1, 2).numpy(), case["attn_out"])


FAMILIES = {"trimkv": check}
