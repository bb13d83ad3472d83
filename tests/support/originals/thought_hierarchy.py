"""Not All Thoughts Need HBM: mean attention over steps, and what is evicted and offloaded."""

import dataclasses

import numpy as np
import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.ops.reduce_layers import reduce_layers
from learnkv.policy.budget import Protected
from learnkv.scorers.snapstream import PromptLength
from learnkv.scorers.thought_hierarchy import LatestAttention, Offloaded
from support.originals.comparing import assert_scores, kept
from support.originals.loading import Case, observation, policy, sidecar_of


def check_importance(case: Case) -> None:
    """Keys are the unit vectors and queries the logarithms of the attention, whose softmax is the attention."""
    scorer, prompt = policy("thought_hierarchy").scorer, case.params["prompt"]
    attention = torch.from_numpy(case["attn"])  # [steps, L, Hq, K]
    entries = attention.shape[-1]
    layers = []
    for layer_idx in range(attention.shape[1]):
        rows = attention[:, layer_idx].transpose(0, 1).unsqueeze(0).clamp(min=torch.finfo(torch.float32).tiny).log()
        keys = torch.eye(entries).expand(1, rows.shape[1], -1, -1)
        gathered: dict[object, Tensor] = {}
        for queries, count in ((rows[:, :, :1], prompt), (rows[:, :, 1:], entries)):
            own = keys[:, :, :count]
            chunk = observation(queries, own, own, scaling=1.0, aligned=count == prompt, layer_idx=layer_idx)
            gathered = {one: one.update(chunk, gathered.get(one)) for one in scorer.statistics}
        layers.append(dataclasses.replace(chunk, statistics=gathered))
    scores = torch.stack([scorer(obs) for obs in layers])
    shared = reduce_layers(layers, scores, "mean", over_heads=True)
    ranked = scorer.refine_layers(layers, scores, torch.zeros(scores.shape[:3]))
    assert bool((ranked == ranked[:1, :, :1]).all())
    assert_scores(shared[0, 0, 0].numpy(), case["score"], atol=2e-7)


def check_manage(case: Case) -> None:
    """Entries on the device and those offloaded before, in one layer of one head."""
    params, importance = case.params, torch.from_numpy(case["importance"])
    on_device, earlier = case["before"].astype(bool), earlier_case(case)
    before = earlier["cpu"].astype(bool) if earlier else np.zeros_like(on_device)
    positions = torch.from_numpy(np.flatnonzero(on_device | before))
    prompt, acts = params["prompt"], (params["step"] + 1) % params["interval"] == 0
    steps = params["cache_positions"] - prompt + 1
    arguments = {"pin_prompt": True, "sinks": params["sink"], "window": params["window"]}
    arguments |= {"resident": params["hbm_ratio"]}
    hierarchy = policy("thought_hierarchy", scorer=arguments, replaced={"sinks": 0, "recent": 0})
    statistics = {
        LatestAttention(): (importance[positions] * steps).view(1, 1, -1, 1),
        Offloaded(): torch.from_numpy(before).float()[positions].view(1, 1, -1, 1),
        PromptLength(): torch.full((1, 1, len(positions), 1), float(prompt)),
    }
    blank = torch.zeros(1, 1, len(positions), 2)
    more = {"positions": positions.view(1, 1, -1), "query_positions": torch.zeros(1, 0), "aligned": False}
    obs: Observation = observation(blank[:, :, :0], blank, blank, statistics=statistics, **more)
    count = int(hierarchy.scorer.candidates(obs).sum())
    enough = acts and count >= hierarchy.scorer.least
    budget = torch.tensor([[[len(positions) - int(params["evict_ratio"] * count) * enough]]])
    scores = hierarchy.planner.score(obs, Protected.of_edges([0])).scores.unsqueeze(0)
    mask = kept(hierarchy.planner.refine_layers([obs], scores, budget), budget)[0, 0, 0]
    (remembered,) = hierarchy.scorer.carry_layers([obs], budget) if acts else [statistics]
    offloaded = remembered[Offloaded()].flatten().numpy() > 0
    assert positions[mask & ~offloaded].tolist() == np.flatnonzero(case["gpu"]).tolist()
    assert positions[mask & offloaded].tolist() == np.flatnonzero(case["cpu"]).tolist()
    gone, before_that = set(positions[~mask].tolist()), set(np.flatnonzero(case["evicted"]).tolist())
    assert gone <= before_that
    assert len(gone) == evicted_before(case, before_that)


def earlier_case(case: Case) -> dict[str, np.ndarray]:
    """Outputs of the case before in the same series; empty for the first of one."""
    params = case.params
    if params["step"] < params["interval"] or not case.number:
        return {}
    earlier = sidecar_of(case.path)["cases"][case.number - 1]
    same = all(earlier["params"].get(name) == params[name] for name in ("op", "prompt", "window", "interval"))
    return case.of(earlier["id"]) if same else {}


def evicted_before(case: Case, everything: set[int]) -> int:
    """Positions that the case evicts: those that the case before had not."""
    earlier = earlier_case(case)
    return len(everything - set(np.flatnonzero(earlier["evicted"]).tolist() if earlier else ()))


def check_thought_hierarchy(case: Case) -> None:
    {"importance": check_importance, "manage": check_manage}[case.params["op"]](case)


FAMILIES = {"thought_hierarchy": check_thought_hierarchy}
