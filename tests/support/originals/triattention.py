"""TriAttention: the authors' scores and selections, and those of a third party's port."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learnkv.formats import tensors
from learnkv.ops.rotary import Layout, Rotary
from learnkv.policy.policy import Policy
from support.originals.comparing import budgets, kept
from support.originals.loading import Case, observation, policy


def built(mean: Tensor, magnitude: Tensor, **arguments: object) -> Policy:
    """The YAML's policy with query statistics [L, N, D] and [L, N, F] in a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = tensors.write(Path(folder) / "queries.safetensors", {"mean": mean, "magnitude": magnitude})
        return policy("triattention", scorer={**arguments, "queries": str(path)})


def rotary(omega: np.ndarray, length: int, scale: float) -> Rotary:
    """RoPE of `length` positions at frequencies [F], which scales its output."""
    angle = torch.arange(length, dtype=torch.float64).unsqueeze(-1) * torch.from_numpy(omega).double()
    cos, sin = ((scale * wave).float().unsqueeze(0) for wave in (angle.cos(), angle.sin()))
    return Rotary(((cos, sin),), Layout.halves(len(omega)))


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
    rope = rotary(shared[f"{name}_inv_freq"], params["absolute_position"], params["attention_scaling"])
    positions = torch.from_numpy(shared[f"{name}_positions"]).long()[prefix:]
    queries = torch.zeros(1, params["Hq"], 0, params["D"])
    raw, by_reduction = [], {}
    for reduction in ("max", "mean"):
        scorer = built(mean, parts["q_abs_mean"], **arguments, group_reduce=reduction).scorer
        of_layers: list[Tensor] = []
        for layer, keys in enumerate(parts["k_rot"][:, None, :, prefix:]):
            more = {"layer_idx": layer, "rotation": lambda: rope, "positions": positions.expand(1, params["Hkv"], -1)}
            obs = observation(queries, keys, keys, **more)
            of_layers.append(scorer(obs)[0])
            if reduction == "max":
                raw.append(scorer.raw_scores(obs)[0].flatten(0, 1))
        by_reduction[reduction] = torch.stack(of_layers)  # [L, H, n - prefix]
    assert_close(torch.cat(raw), case["raw"])
    best = by_reduction["max"]
    for key, scores in {
        "keep_per_layer_head_max": best,
        "keep_per_layer_head_mean": by_reduction["mean"],
        # Sets that layers share, which are left out here, follow from the same scores. The best of the union of all
        # heads' choices are the best by the maximum over heads.
        "keep_per_head": best.mean(0),
        "keep_union": best.amax((0, 1)).unsqueeze(0),
    }.items():
        want = case[key].reshape(*scores.shape[:-1], -1)
        mask = np.zeros((*scores.shape[:-1], params["n"]), dtype=bool)
        np.put_along_axis(mask, want, True, -1)
        assert mask[..., :prefix].all()
        assert_kept(kept(scores, torch.full(scores.shape[:-1], budget - prefix)), scores.numpy(), mask[..., prefix:])


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
    scorer = built(*statistics, furthest=params["offset_max"], aggregation=params["aggregation"]).scorer
    rope = rotary(case["omega"], params["round_start"], params["freq_scale_sq"] ** 0.5)
    queries = torch.zeros(1, statistics[0].shape[1], 0, keys.shape[3])
    assert_close(scorer.raw_scores(observation(queries, keys, keys, rotation=lambda: rope))[0], case["scores"])


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
