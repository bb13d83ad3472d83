"""Methods that vary or correct SnapKV's scores: FastKV, R-KV."""

import numpy as np
import torch

from originals.comparing import assert_kept, assert_scores, budgets, kept
from originals.loading import Case, policy, scored


def check_rkv(case: Case) -> None:
    params = case.params
    arguments = {
        "window": params["window"],
        "kernel_size": params["kernel"],
        "mix": params["mix_lambda"],
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


FAMILIES = {"rkv": check_rkv, "fastkv_tsp": check_fastkv}
