"""kvpress's AdaKV, CriticalKV and both together."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnkv.policy.policy import Policy
from support.originals.comparing import assert_best, assert_kept, assert_scores, kept
from support.originals.loading import Case, policy, whole


def base_of(params: dict[str, Any]) -> tuple[dict[str, Any], slice]:
    """The scorer that is wrapped, and the entries that it keeps in any case."""
    if params["base"] == "SnapKV":
        arguments = {"window": params["window"], "kernel_size": params["kernel"], "pooling": "avg"}
        return {"class_path": "learnkv.scorers.SnapKV", "init_args": arguments}, slice(-params["window"], None)
    assert params["base"] == "ExpectedAttention", params["base"]
    sinks = params.get("n_sink", 4)
    arguments = {"epsilon": params["epsilon"], "value_norm": params["use_vnorm"], "sinks": sinks}
    arguments["future"] = params.get("n_future_positions", 512)
    return {"class_path": "learnkv.scorers.ExpectedAttention", "init_args": arguments}, slice(0, sinks)


def budget_of(params: dict[str, Any], entries: int) -> Tensor:
    return torch.tensor([int(entries * (1 - params["compression_ratio"]))], dtype=torch.float64)


def check_adakv(case: Case) -> None:
    base, protected = base_of(case.params)
    arguments = {"floor": case.params["alpha_safeguard"], "rounding": "kvpress"}
    adakv = with_scorer("adakv", base, allocator=arguments)
    scores = adakv.scorer(whole(case, adakv)).clone()
    golden = case["base_scores"].copy()
    golden[..., protected], scores[..., protected] = np.inf, torch.inf
    finite = np.isfinite(golden)
    assert_scores(scores.numpy()[finite], golden[finite], rtol=TOLERANCE[case.params["base"]])
    wanted = adakv.allocator(scores.unsqueeze(0), None, budget_of(case.params, scores.shape[-1]))[0]
    assert np.array_equal(wanted, case["kept_per_head"])
    mask = kept(scores, wanted.long())
    for mine, ranking, theirs in zip(mask[0], golden[0], case["kept_mask"][0], strict=True):
        assert_best(mine, ranking, int(theirs.sum()))
        assert_best(theirs.astype(bool), ranking, int(theirs.sum()))


def check_critical(case: Case) -> None:
    base, protected = base_of(case.params)
    arguments = {"first_stage": case.params["first_stage_ratio"], "epsilon": case.params["epsilon_critical"]}
    adaptive = case.params["press"] == "CriticalAdaKV"
    changes = {"scorer": arguments | {"base": base}}
    if adaptive:
        changes["scorer"]["floor"] = case.params["alpha_safeguard"]
        changes["allocator"] = {"floor": case.params["alpha_safeguard"], "rounding": "kvpress"}
    critical = policy("critical_adakv" if adaptive else "criticalkv", **changes)
    obs = whole(case, critical)
    scores = critical.scorer(obs).clone()
    scores[..., protected] = torch.inf
    wanted = critical.allocator(scores.unsqueeze(0), None, budget_of(case.params, scores.shape[-1]))[0].long()
    ranking = critical.scorer.refine(obs, scores, wanted)
    first = ranking.numpy() == np.finfo(np.float32).max
    if adaptive:
        assert np.array_equal(wanted, case["kept_per_head"])
        theirs = case["kept_mask"].astype(bool)
        assert theirs[first].all(), "an entry of the first stage was evicted"
        for mine, row, number in zip(theirs[0], ranking[0].numpy(), wanted[0].tolist(), strict=True):
            assert_best(mine, np.minimum(row, 1e6), number, margin=1e-5)
        return
    assert (first.sum(-1) == case.params["first_stage_budget"]).all()
    assert_scores(critical.scorer.contributions(obs).numpy(), case["wov_l1"])
    golden = case["scores"]
    assert np.array_equal(first, golden == np.finfo(np.float32).max)
    assert_scores(ranking.numpy()[~first], golden[~first], rtol=TOLERANCE[case.params["base"]])
    assert_kept(kept(ranking, wanted), golden, case["kept"])


def with_scorer(name: str, scorer: dict[str, Any], **changes: dict[str, Any]) -> Policy:
    """The policy of a YAML with another scorer."""
    return policy(name, replaced={"scorer": scorer}, **changes)


def check_press(case: Case) -> None:
    check = {"AdaKV": check_adakv, "CriticalKV": check_critical, "CriticalAdaKV": check_critical}
    check[case.params["press"]](case)


TOLERANCE = {"SnapKV": 2e-4, "ExpectedAttention": 2e-3}
FAMILIES = {"kvpress_adacrit": check_press}
