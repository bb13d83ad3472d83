"""SnapKV, and PyramidKV and AdaKV on its scores."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnkv.policy.policy import Policy
from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, policy, scored


def snapkv_arguments(params: dict[str, Any], window_reduce: str) -> dict[str, Any]:
    return {
        "window": params["window"],
        "kernel_size": params["kernel"],
        "pooling": params["pooling"].removesuffix("pool"),
        "window_reduce": params.get("window_reduce", window_reduce),
        "group_reduce": params.get("group_agg") or "mean",
        "group_first": params.get("group_agg_position", "before_pooling") == "before_pooling",
    }


def past_and_protected(case: Case, policy: Policy) -> tuple[np.ndarray, Tensor]:
    """Golden scores of the past, checked against ours, and our scores with the whole window protected.

    Where the prompt is shorter than the capacity, the originals return it before they score anything.
    """
    scores = scored(case, policy)
    past = max(scores.shape[-1] - case.params["window"], 0)
    ours = scores[..., :past].numpy().copy()
    golden = case.unread.pop("scores", ours)
    assert_scores(ours, golden)
    scores[..., past:] = torch.inf
    return golden, scores


def check_snapkv(case: Case) -> None:
    snapkv = policy("snapkv", scorer=snapkv_arguments(case.params, "sum"))
    golden, scores = past_and_protected(case, snapkv)
    budget = budgets(snapkv, scores, case.params["capacity"])[0]
    assert_kept(kept(scores, budget), golden, case["kept"])


def check_pyramid_select(case: Case) -> None:
    params = case.params
    allocator = {"beta": params["beta"], "protected": params["window"], "rounding": "original"}
    pyramidkv = policy("pyramidkv", scorer=snapkv_arguments(params, "sum"), allocator=allocator)
    golden, scores = past_and_protected(case, pyramidkv)
    for layer, budget in enumerate(budgets(pyramidkv, scores, params["capacity"], params["num_layers"])):
        assert_kept(kept(scores, budget), golden, case[f"kept_l{layer}"])


def check_pyramid_table(case: Case) -> None:
    params = case.params
    tables = {"kept_len_kvcf": "original", "kept_len_adakv": "adakv", "n_kept": "kvpress"}
    for output in list(case.unread):
        allocator = {"beta": params["beta"], "protected": params["window"], "rounding": tables[output]}
        pyramidkv = policy("pyramidkv", allocator=allocator)
        budget = params["capacity"] if "capacity" in params else params["T"] * (1 - params["compression_ratio"])
        table = budgets(pyramidkv, torch.zeros(1, 1, params["T"]), budget, params["num_layers"])
        assert table.flatten().tolist() == case[output].tolist()


def check_adakv(case: Case) -> None:
    params = case.params
    allocator = {"floor": params["floor_alpha"], "rounding": "original", "normalize": bool(params["normalize"])}
    name = "adakv"
    if params["pyramid"]:
        name = "adapyramidkv"
        pyramid = {"beta": params["beta"], "protected": params["window"], "rounding": "adakv"}
        allocator["base"] = {"class_path": "learnkv.allocators.Pyramid", "init_args": pyramid}
    adakv = policy(name, scorer=snapkv_arguments(params, "mean"), allocator=allocator)
    golden, scores = past_and_protected(case, adakv)
    every = budgets(adakv, scores, params["capacity"], params.get("num_layers", 1))
    budget = every[params.get("layer_idx", 0)]
    assert (budget - params["window"]).flatten().tolist() == case["head_budgets"].flatten().tolist()
    assert_kept(kept(scores, budget)[0], golden[0], case["kept"])


FAMILIES = {
    "snapkv_queryhead": check_snapkv,
    "snapkv_kvhead": check_snapkv,
    "pyramidkv_select": check_pyramid_select,
    "pyramidkv_budgets": check_pyramid_table,
    "kvpress_pyramid_budgets": check_pyramid_table,
    "adakv": check_adakv,
}
