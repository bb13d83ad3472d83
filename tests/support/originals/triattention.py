"""TriAttention: the authors' scores and selections, and those of a third party's port."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnkv.formats import tensors
from learnkv.ops.rotary import Layout
from learnkv.policy.policy import Policy
from support.originals.comparing import budgets, kept
from support.originals.loading import Case, observation, policy


def built(mean: Tensor, magnitude: Tensor, omega: np.ndarray, scale: float, **arguments: object) -> Policy:
    """The YAML's policy with queries [L, N, D] and [L, N, F], frequencies [F] and RoPE's scale in a file."""
    pairs = len(omega)
    measured = {
        "mean": mean,
        "magnitude": magnitude,
        "frequency": torch.from_numpy(omega).expand(len(mean), -1),
        "scale": torch.full((len(mean), pairs), scale),
        "layout": torch.tensor(Layout.halves(pairs)).expand(len(mean), -1),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = tensors.write(Path(folder) / "queries.safetensors", measured)
        return policy("triattention_decode", scorer={**arguments, "queries": str(path)})


def assert_close(got: Tensor, want: np.ndarray) -> None:
    """Phases of positions up to 65,536 are float32 in the originals."""
    assert got.shape == want.shape
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=3e-3 * np.abs(want).max())


def assert_kept(got: np.ndarray, scores: np.ndarray, want: np.ndarray) -> None:
    """The same entries are kept, but for those whose scores are as near to the last kept one as float32 phases are."""
    assert np.array_equal(got.sum(-1), want.sum(-1))
    threshold = np.where(got, scores, np.inf).min(-1, keepdims=True)
    apart = np.abs(scores - threshold) > 1e-3 * np.abs(scores).max()
    assert np.array_equal(got & apart, want & apart)


def check_authors(case: Case) -> None:
    params, shared = case.params, case.shared
    name, prefix, budget = params["inputs"], params["prefix"], params["budget"]
    parts = {
        key: torch.from_numpy(shared[f"{name}_{key}"]) for key in ("q_mean_real", "q_mean_imag", "q_abs_mean", "k_rot")
    }
    arguments = {
        "furthest": params["offset_max_length"],
        "aggregation": params["aggregation"],
        "standardise": params["normalize"],
        "trigonometric": not params["disable_trig"],
        "concentration": not params["disable_mlr"],
    }
    mean = torch.cat([parts["q_mean_real"], parts["q_mean_imag"]], -1)
    statistics = (mean, parts["q_abs_mean"], shared[f"{name}_inv_freq"], params["attention_scaling"])
    positions = torch.from_numpy(shared[f"{name}_positions"]).long()[prefix:]
    assert params["absolute_position"] == positions[-1] + 1
    queries = torch.zeros(1, params["Hq"], 0, params["D"])
    raw: list[Any] = []
    for key, changes in {
        "keep_per_head": {"sharing": "per_head"},
        "keep_union": {"sharing": "union"},
        "keep_per_layer_head_max": {"sharing": "none"},
        "keep_per_layer_head_mean": {"sharing": "none", "group_reduce": "mean"},
    }.items():
        scorer = built(*statistics, **arguments, **changes).scorer
        more = {"positions": positions.expand(1, params["Hkv"], -1)}
        layers = [
            observation(queries, keys, keys, layer_idx=layer, **more)
            for layer, keys in enumerate(parts["k_rot"][:, None, :, prefix:])
        ]
        raw = raw or [scorer.raw_scores(obs)[0].flatten(0, 1) for obs in layers]
        scores = torch.stack([scorer(obs) for obs in layers])  # [L, 1, H, n - prefix]
        wanted = torch.full(scores.shape[:-1], budget - prefix)
        assert scorer.refines_layers == (changes["sharing"] != "none")
        scores = scorer.refine_layers(layers, scores, wanted)[:, 0] if scorer.refines_layers else scores[:, 0]
        mask = np.zeros((*scores.shape[:-1], params["n"]), dtype=bool)
        # A set that layers, or all heads, share is theirs in every one of them.
        np.put_along_axis(mask, np.broadcast_to(case[key], (*scores.shape[:-1], budget)), True, -1)
        assert mask[..., :prefix].all()
        assert_kept(kept(scores, wanted[:, 0]), scores.numpy(), mask[..., prefix:])
    assert_close(torch.cat(raw), case["raw"])


def check_port(case: Case) -> None:
    if case.params["op"] == "select":
        check_segments(case)
        return
    params = case.params
    keys = torch.from_numpy(case["keys"]).transpose(0, 1).unsqueeze(0)  # [1, H, T, D]
    if params["style"] == "interleaved":
        keys = torch.cat([keys[..., 0::2], keys[..., 1::2]], -1)
    mean = [case["qr"], case["qi"], *([case["q_pass"]] if "q_pass" in case else [])]
    statistics = [torch.from_numpy(part).flatten(0, 1).unsqueeze(0) for part in (np.concatenate(mean, -1), case["qa"])]
    arguments = {"furthest": params["offset_max"], "aggregation": params["aggregation"]}
    scorer = built(*statistics, case["omega"], params["freq_scale_sq"] ** 0.5, **arguments).scorer
    queries = torch.zeros(1, statistics[0].shape[1], 0, keys.shape[3])
    # The port is given the next position, which here is that after the last entry.
    positions = torch.arange(keys.shape[2]) + params["round_start"] - keys.shape[2]
    more = {"positions": positions.expand(1, keys.shape[1], -1)}
    assert_close(scorer.raw_scores(observation(queries, keys, keys, **more))[0], case["scores"])


def check_segments(case: Case) -> None:
    params = case.params
    scores = torch.from_numpy(case["sel_scores"]).view(1, 1, -1)
    scores[..., : params["prefix"]] = scores[..., scores.shape[-1] - params["recent"] :] = torch.inf
    segmented = policy("triattention", scorer={"parts": params["segments"] if params["policy"] == "v3" else 0})
    wanted = budgets(segmented, scores, params["budget"])[0]
    obs = observation(torch.zeros(1, 1, 0, 2), *torch.zeros(2, 1, 1, scores.shape[-1], 2))
    if segmented.scorer.refines:
        scores = segmented.planner.refine(obs, scores, wanted)
    assert kept(scores, wanted)[0, 0].nonzero()[0].tolist() == case["keep"].tolist()


FAMILIES = {"triattention": check_authors, "triattention_ascend": check_port}
