"""Flux Attention's router: pooled queries, logits and the decision."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from learnkv.formats import tensors
from learnkv.ops.layer_router import full_margin, router_logits
from support.originals.comparing import assert_scores
from support.originals.loading import Case, observation, policy


def check_flux_router(case: Case) -> None:
    """Queries before rotation, as of a layer that rotates nothing, read in two chunks."""
    params, queries = case.params, torch.from_numpy(case["q"]).transpose(1, 2)
    size, dim = params["pool_size"], queries.shape[-1]
    stored = {name: torch.from_numpy(case[name]).unsqueeze(0) for name in tensors.LAYER_ROUTER}
    with tempfile.TemporaryDirectory() as folder:
        file = tensors.write(Path(folder) / "router.safetensors", stored)
        arguments = {"router": str(file), "pool_size": size, "decide": "router", "sink": 1, "recent": 1}
        allocator = policy("flux_attention", allocator=arguments).allocator
    (statistic,) = allocator.statistics

    gathered, half = None, queries.shape[2] // 2
    for begin, end in ((0, half), (half, queries.shape[2])):
        keys = torch.zeros(len(queries), queries.shape[1], end, dim)
        gathered = statistic.update(observation(queries[:, :, begin:end], keys, keys), gathered)
    last = queries[:, :, -size:]
    obs = observation(last, keys, keys, statistics={statistic: gathered})
    assert_scores(statistic.mean(obs).numpy(), case["pooled"])
    logits = router_logits({name: weight[0] for name, weight in allocator.weights.items()}, statistic.mean(obs))
    golden = case["logits"]
    assert_scores(logits.numpy(), golden, rtol=2e-4, atol=1e-4)

    features = allocator.features(obs)
    np.testing.assert_allclose(features[:, 0, 0].numpy(), full_margin(logits).numpy(), rtol=1e-6)
    scores = torch.zeros(1, *keys.shape[:3])
    wanted = allocator(scores, features.unsqueeze(0), torch.full((len(keys),), 5.0))[0, :, 0]
    decided, margin = case["z"] > 0, full_margin(torch.from_numpy(golden)).numpy()
    # With one logit the original draws noise before it decides: only what is far from even is certain.
    clear = np.abs(margin) > (1e-3 if params["use_softmax"] else 20)
    assert (wanted > 2).numpy()[clear].tolist() == decided[clear].tolist()


FAMILIES = {"flux_router": check_flux_router}
