"""Layers that share by what their attention and their scores look like: CAKE and LAVa."""

import numpy as np
import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.policy.policy import Policy
from support.originals.comparing import assert_kept, assert_scores, kept
from support.originals.loading import Case, inputs_of, observation, policy, sidecar_of

RTOL = 1e-3


def layers_of(case: Case, policy: Policy) -> list[Observation]:
    """Layer l is the inputs with its queries multiplied by the file's layer_scale[l]."""
    inputs = inputs_of(case)
    before = inputs["k"].shape[2] - case.params["window"]
    return [
        observation(scale * inputs["q"][:, :, before:], inputs["k"], inputs["v"], layer_idx=layer)
        for layer, scale in enumerate(sidecar_of(case.path)["layer_scale"])
    ]


def scored_layers(case: Case, policy: Policy, layers: list[Observation]) -> tuple[list[np.ndarray], Tensor]:
    """Golden scores of each layer's past, checked against ours, and ours [L, B, H, S] with the window protected."""
    scores = torch.stack([policy.scorer(one) for one in layers])
    past = scores.shape[-1] - case.params["window"]
    golden = [case[f"scores_l{layer}"] for layer in range(len(scores))]
    for ours, theirs in zip(scores, golden, strict=True):
        assert_scores(ours[..., :past].numpy(), theirs, rtol=RTOL)
    scores[..., past:] = torch.inf
    return golden, scores


def check_cake(case: Case) -> None:
    params = case.params
    scorer = {"window": params["window"], "kernel_size": params["kernel"], "gamma": params["gamma"]}
    allocator = {"window": params["window"], "tau1": params["tau1"], "tau2": params["tau2"], "rounding": "original"}
    cake = policy(
        "cake",
        scorer=scorer | {"pooling": params["pooling"].removesuffix("pool")},
        allocator=allocator | {"cascading": params["cascading"]},
    )
    layers = layers_of(case, cake)
    golden, scores = scored_layers(case, cake, layers)
    features = torch.stack([cake.allocator.features(one) for one in layers])
    assert_scores(cake.allocator.preferences(features)[:, 0].numpy(), case["pref"], rtol=RTOL)
    wanted = cake.allocator(scores, features, torch.tensor([params["capacity"]], dtype=torch.float64))
    budget = case["budgets"]
    assert (wanted[:, 0, 0] - params["window"]).tolist() == budget.tolist()
    assert case["layer_budget_field"].tolist() == budget.tolist()
    for layer, ranking in enumerate(golden):
        assert_kept(kept(scores[layer], wanted[layer].long()), ranking, case[f"kept_l{layer}"])


def check_cake_repair(case: Case) -> None:
    """Preferences with an entropy that is given, a variance of 1 and temperatures of 1."""
    params, preference = case.params, torch.from_numpy(case["pref"])
    features = torch.stack([preference, torch.ones_like(preference)], -1)[:, None, None]
    scores = torch.zeros(params["L"], 1, 1, params["seq_len"])
    budget = torch.tensor([params["total"] / params["L"]], dtype=torch.float64)
    for rounding, output in (("exact", "raw"), ("original", "out")):
        cake = policy("cake", allocator={"tau1": 1, "tau2": 1, "rounding": rounding, "cascading": False})
        np.testing.assert_allclose(cake.allocator(scores, features, budget).flatten(), case[output], rtol=1e-5)


def check_lava(case: Case) -> None:
    params = case.params
    scorer = {"window": params["window"], "kernel_size": params["kernel"]}
    base = {"class_path": "learnkv.allocators.LAVa", "init_args": {"rounding": "original"}}
    allocator = {"floor": params["floor_alpha"], "rounding": "original", "base": base}
    lava = policy("lava", scorer=scorer | {"pooling": params["pooling"].removesuffix("pool")}, allocator=allocator)
    golden, scores = scored_layers(case, lava, layers_of(case, lava))
    assert_scores(lava.allocator.base.weights(scores)[:, 0].numpy(), case["entropy"], rtol=RTOL)
    budget, window = torch.tensor([params["capacity"]], dtype=torch.float64), params["window"]
    assert (lava.allocator.base(scores, None, budget)[:, 0, 0] - window).tolist() == case["base"].tolist()
    wanted = lava.allocator(scores, None, budget)
    for layer, ranking in enumerate(golden):
        assert (wanted[layer, 0] - window).tolist() == case[f"head_budgets_l{layer}"].tolist()
        assert_kept(kept(scores[layer], wanted[layer].long())[0], ranking[0], case[f"kept_l{layer}"])


FAMILIES = {"cake": check_cake, "cake_adjust_budgets": check_cake_repair, "lava": check_lava}
