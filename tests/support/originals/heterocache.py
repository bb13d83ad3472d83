"""HeteroCache: kinds of heads, what heads keep of a prompt, and what satellites load again."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learnkv.core.entry_selector import Lookup
from learnkv.formats import heterocache
from learnkv.ops.head_taxonomy import Taxonomy, taxonomy, top_sets
from learnkv.policy.policy import Policy
from support.originals.loading import Case, observation, policy


def check_heterocache(case: Case) -> None:
    checks = {"taxonomy": check_taxonomy, "runtime": check_runtime}
    checks[case.params["op"]](case)


def check_taxonomy(case: Case) -> None:
    params = case.params
    prompt, heads = params["prefill_len"], params["Hkv"]

    def sets(layer: int, step: int) -> Tensor:
        attention = torch.from_numpy(case[f"attn_l{layer}_s{step}"])[..., :prompt]
        return top_sets(attention.unflatten(1, (heads, -1)), params["topk"])

    steps = [[sets(layer, step) for step in params["steps"]] for layer in range(params["L"])]
    found = taxonomy(steps, params["stable_threshold"], params["sim_threshold"])
    assert found.kinds.tolist() == case["types"].tolist()
    assert found.pivots.tolist() == case["pivot_of"].tolist()
    np.testing.assert_allclose(found.weights.numpy(), case["alloc"], rtol=1e-5)
    with tempfile.TemporaryDirectory() as folder:
        again = heterocache.read(heterocache.write(Path(folder) / "kinds.json", found))
    assert torch.equal(again.pivots, found.pivots)
    counts = params["counts"]
    assert [int((again.kinds == kind).sum()) for kind in (1, 2, 3, 4)] == [
        counts[name] for name in ("anchor", "volatile", "pivot", "satellite")
    ]


def table(params: dict[str, Any]) -> Taxonomy:
    """One layer; the order of the pivots is that of the file."""
    kinds, pivots = torch.tensor([params["types"]]), torch.full((1, len(params["types"])), -1)
    for pivot, satellites in params["relations"].items():
        pivots[0, satellites] = int(pivot)
    weights = torch.tensor([params["alloc"]], dtype=torch.float64)
    return Taxonomy(kinds, weights, pivots, [[int(pivot) for pivot in params["relations"]]])


def policies(params: dict[str, Any], loading: str) -> tuple[Policy, Policy]:
    """What evicts, and what reads."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(heterocache.write(Path(folder) / "kinds.json", table(params)))
        pages = {"kinds": file, "loading": loading, "stable": params["stable_threshold"]}
        pages |= {"ratio": params["compression_ratio"]}
        evicting = policy("heterocache", allocator={"kinds": file, "rounding": "original"})
        return evicting, policy("heterocache_reload", pages=pages)


def check_runtime(case: Case) -> None:
    params = case.params
    entries, heads = params["T"], len(params["types"])
    query, keys, order = (torch.from_numpy(case[name]) for name in ("q_last", "k", "perm"))
    decoded, lens, kept, after = (torch.from_numpy(case[name]) for name in ("qdec", "lens", "kept", "kept_after"))
    evicting, selecting = policies(params, "original")
    scores = torch.zeros(1, 1, heads, entries)
    wanted = evicting.allocator(scores, None, torch.tensor([entries * params["compression_ratio"]]).double())
    assert wanted[0, 0, order].tolist() == lens.tolist()

    obs = observation(query.view(1, -1, 1, query.shape[-1]), keys.unsqueeze(0), keys.unsqueeze(0))
    tokens = torch.tensor([entries])
    state = dict(selecting.pages.begin(obs, tokens))
    assert int(state["base"]) == params["base"]
    assert torch.equal(state["read"][0, order], kept.bool())

    def decode(selector: Any) -> Tensor:
        """What heads read of the prompt after the queries; the tokens themselves have no keys in the file."""
        own = dict(state)
        for number, one in enumerate(decoded, start=1):
            padded = torch.cat([keys, keys.new_zeros(heads, number, keys.shape[-1])], 1).unsqueeze(0)
            group = one.shape[0] // heads
            logits = torch.zeros(1, heads, group, entries + number)
            count = torch.full((1, heads), entries)
            parts = (one.unsqueeze(0), padded, logits, count + number, count, tokens, 0)
            _, own = selector(Lookup(*parts, keys.shape[-1] ** -0.5, {}), own)
        return own["read"][0, order]

    assert torch.equal(decode(selecting.pages), after.bool())
    assert torch.equal(after.bool(), kept.bool()) == (not params["reloaded"])
    corrected = decode(policies(params, "best")[1].pages)
    assert torch.equal(corrected.sum(-1), lens)
    if not params["reloaded"]:
        assert torch.equal(corrected, after.bool()), "the corrected loading differs where something is loaded only"


FAMILIES = {"heterocache": check_heterocache}
