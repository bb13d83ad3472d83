"""The methods of kvpress that score one layer at a time."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from learnkv.policy.policy import Policy
from support.originals.comparing import assert_kept, assert_scores, budgets, kept
from support.originals.loading import Case, policy, scored, whole


def knorm(case: Case) -> tuple[Policy, Tensor, slice]:
    """A policy, its scores [B, H, T] of the case, and the entries that kvpress keeps in any case; so do the others."""
    made = policy("knorm")
    return made, scored(case, made), slice(0, 0)


def keydiff(case: Case) -> tuple[Policy, Tensor, slice]:
    made = policy("keydiff")
    return made, scored(case, made), slice(0, 0)


def tova(case: Case) -> tuple[Policy, Tensor, slice]:
    made = policy("tova")
    return made, scored(case, made), slice(-1, None)


def snapkv(case: Case) -> tuple[Policy, Tensor, slice]:
    arguments = {"window": case.params["window"], "kernel_size": case.params["kernel"], "group_first": False}
    made = policy("snapkv", scorer=arguments)
    return made, scored(case, made), slice(-case.params["window"], None)


def expected_attention(case: Case) -> tuple[Policy, Tensor, slice]:
    params = case.params
    arguments = {
        "future": params["n_future_positions"],
        "sinks": params["n_sink"],
        "covariance": params["use_covariance"],
        "value_norm": params["use_vnorm"],
        "epsilon": params["epsilon"],
    }
    made = policy("expected_attention", scorer=arguments)
    obs = whole(case, made)
    mean, covariance = made.scorer.future_queries(obs)
    if "mu" in case:
        assert_scores(mean.numpy(), case["mu"], rtol=1e-3, atol=1e-5)
    if "cov_head0" in case:
        assert_scores(covariance[:, :1].numpy(), case["cov_head0"], rtol=1e-3, atol=1e-5)
    return made, made.scorer(obs), slice(0, params["n_sink"])


def observed_attention(case: Case) -> tuple[Policy, Tensor, slice]:
    made = policy("observed_attention")
    return made, made.scorer(whole(case, made)), slice(0, 0)


PRESSES: dict[str, Callable[[Case], tuple[Policy, Tensor, slice]]] = {
    "Knorm": knorm,
    "KeyDiff": keydiff,
    "TOVA": tova,
    "SnapKV": snapkv,
    "ExpectedAttention": expected_attention,
    "ObservedAttention": observed_attention,
}


def check_press(case: Case) -> None:
    """What is kept in any case has one score above all others in kvpress."""
    if case.params["press"] == "StreamingLLM":
        check_streaming_llm(case)
        return
    made, scores, protected = PRESSES[case.params["press"]](case)
    ranking = scores.numpy().copy()
    if "scores" in case:
        golden = case["scores"].copy()
        golden[..., protected] = ranking[..., protected]
        assert_scores(ranking, golden, **TOLERANCE.get(case.params["press"], {}))
        ranking = golden
    scores = scores.clone()  # may be one row for all heads
    scores[..., protected], ranking[..., protected] = torch.inf, np.inf
    assert_kept(kept(scores, budgets(made, scores, case.params["n_kept"])[0]), ranking, case["kept"])


def check_streaming_llm(case: Case) -> None:
    """kvpress scores what it keeps with 1, everything else with 0."""
    streaming = policy("streaming_llm", scorer={"sinks": case.params["n_sink"]})
    scores = scored(case, streaming)
    mask = kept(scores, budgets(streaming, scores, case.params["n_kept"])[0])
    if "scores" in case:
        assert np.array_equal(mask, case["scores"] > 0)
    assert_kept(mask, scores.numpy(), case["kept"])


FAMILIES = {"kvpress": check_press}
TOLERANCE = {"ExpectedAttention": {"rtol": 2e-3}}
