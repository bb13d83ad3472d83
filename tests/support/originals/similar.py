"""Methods that vary or correct SnapKV's scores: FastKV, R-KV, ReST-KV."""

import numpy as np
import torch

from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, inputs_of, policy, projection, scored


def check_rkv(case: Case) -> None:
    params = case.params
    arguments = {
        "window": params["window"],
        "kernel_size": params["kernel"],
        "mix_lambda": params["mix_lambda"],
        "threshold": params["similarity_threshold"],
        "keep_copy": params["retain_direction"],
    }
    rkv = policy("rkv", scorer=arguments)
    scores = scored(case, rkv)
    past = scores.shape[-1] - params["window"]
    golden = case["scores"]
    assert_scores(scores[..., :past].numpy(), golden)
    scores[..., past:] = torch.inf
    assert_kept(kept(scores, budgets(rkv, scores, params["budget"])[0]), golden, case["kept"])


def check_fastkv(case: Case) -> None:
    params = case.params
    arguments = {
        "window": params["window"],
        "kernel_size": params["kernel"],
        "pooling": params["pooling"].removesuffix("pool"),
    }
    fastkv = policy("fastkv", scorer=arguments)
    scores = scored(case, fastkv)
    past = scores.shape[-1] - params["window"]
    golden, propagated = case["scores"], case["tsp_scores"]
    assert_scores(scores[..., :past].numpy(), golden)
    # Which tokens upper layers would read, which is left out here, follows from the same scores.
    together = scores.sum(1)
    assert_scores(together[..., :past].numpy(), propagated)
    scores[..., past:], together[..., past:] = torch.inf, torch.inf
    assert_kept(kept(scores, budgets(fastkv, scores, params["capacity"])[0]), golden, case["kept"])
    wanted = np.sort(case["tsp_idx"])
    assert_kept(kept(together, torch.full(together.shape[:1], params["tsp_length"])), propagated, wanted)


def check_restkv(case: Case) -> None:
    params = case.params
    arguments = {
        "window": params["window"],
        "kernel_size": params["kernel_size"],
        "pooling": params["pooling"].removesuffix("pool"),
        "alpha": params["alpha"] if params["use_ema"] else None,
        "each_query": params["metric_mode"] == "before",
        "project": params["use_wo"],
        "relative": params.get("use_norm", False),
        "scale": params.get("scale", 2000),
    }
    restkv = policy("restkv", scorer=arguments)
    case.params["granularity"] = "query_head"
    inputs = inputs_of(case)
    entries = inputs["k"].shape[2]
    keep = torch.full((len(inputs["k"]),), params["capacity"] / entries, dtype=torch.float64)
    scores = scored(case, restkv, keep=keep, project=projection(case))
    past = entries - params["window"]
    golden = case["scores"]
    assert_scores(scores[..., :past].numpy(), golden, rtol=1e-3)
    scores[..., past:] = torch.inf
    assert_kept(kept(scores, budgets(restkv, scores, params["capacity"])[0]), golden, case["kept"])


FAMILIES = {"rkv": check_rkv, "fastkv_tsp": check_fastkv, "restkv": check_restkv}
