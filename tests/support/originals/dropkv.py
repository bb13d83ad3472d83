"""DropKV: scores of the entries before the window, and what is kept."""

import torch

from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, policy, scored


def check_dropkv(case: Case) -> None:
    params = case.params
    arguments = {"window": params["window"], "kernel_size": params["kernel"], "epsilon": params["epsilon"]}
    dropkv = policy("dropkv", scorer=arguments)
    scores = scored(case, dropkv)
    past, golden = scores.shape[-1] - params["window"], case["scores"]
    # Distances are expanded there: a difference of large numbers.
    assert_scores(scores[..., :past].numpy(), golden, rtol=2e-3, atol=1e-4 * float(golden.max()))
    scores[..., past:] = torch.inf
    assert_kept(kept(scores, budgets(dropkv, scores, params["capacity"])[0]), golden, case["kept"])


FAMILIES = {"kvpress_dropkv": check_dropkv}
