"""Layers evicted as soon as they have read the prompt keep what a complete prompt would have been compressed to."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import attached, kept, padded, policy_for, tokens
from torch import Tensor

from learnkv import Policy, continuation, prefill
from learnkv.allocators import AdaKV, LayerByLayer, Pyramid
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.scorers import H2O, SnapKV

pytestmark = pytest.mark.compat
LENGTHS = (97, 60, 41)
POLICIES = {
    "static": lambda model: policy_for("pyramidkv", model),
    "learned static": lambda model: Policy(SnapKV(window=16), policy_for("tokens", model).allocator),
    "heads by scores": lambda _: Policy(SnapKV(), LayerByLayer(Pyramid(), AdaKV(normalize=True))),
    "statistics": lambda _: Policy(H2O(), LayerByLayer()),
    "rotated": lambda model: Policy(SnapKV(), policy_for("causal", model).allocator, rerotate="end"),
    "causal": lambda model: policy_for("causal", model),
    "tokens": lambda model: Policy(policy_for("tokens", model).scorer, policy_for("causal", model).allocator),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompts(seed: int = 0) -> tuple[Tensor, Tensor]:
    return padded([tokens(1, length, seed=seed)[0] for length in LENGTHS])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("name", POLICIES)
def test_evicting_layer_by_layer_is_evicting_at_the_end(name: str, family: str) -> None:
    model = attached(family)
    policy, said = POLICIES[name](model), tokens(3, 5, seed=1)
    assert policy.reads_once
    dense = prefill(model, *prompts(), policies=[policy])
    for spend in ({"keep": 0.1}, {"keep": 0.37}, {"budget": 25}, {"budget": 70}):
        ours, theirs = prefill(model, *prompts(), policy=policy, **spend), policy.compress(dense.fork(), **spend)
        assert torch.equal(ours.budgets, theirs.budgets)
        assert [kept(ours, row) for row in range(3)] == [kept(theirs, row) for row in range(3)]
        assert ours.spent == theirs.spent
        assert torch.equal(continuation(model, said, ours), continuation(model, said, theirs))


@pytest.mark.parametrize("chunk_size", [7, 40, 96])
def test_whatever_the_chunks_and_the_batch(chunk_size: int) -> None:
    model = attached("llama")
    policy = POLICIES["causal"](model)
    together = prefill(model, *prompts(), policy=policy, keep=0.2)
    assert together.budgets.sum((0, 2)).tolist() == [round(0.2 * n * 6) for n in LENGTHS]
    assert together.budgets.sum(-1).unique(dim=1).shape[1] == 3
    parts = prefill(model, *prompts(), policy=policy, keep=0.2, chunk_size=chunk_size)
    assert torch.equal(together.budgets, parts.budgets)
    for row, length in enumerate(LENGTHS):
        alone = prefill(model, tokens(1, length), policy=policy, keep=0.2)
        assert kept(together, row) == kept(alone, 0) == kept(parts, row)


@pytest.mark.parametrize("name", ["static", "heads by scores", "causal", "at the end"])
def test_the_prompt_is_held_in_full_by_one_layer_at_most(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes while the prompt is read: one layer, beside what the layers before it kept."""
    model, ids, held = attached("llama"), tokens(2, 400), []
    policy = policy_for("adakv", model) if name == "at the end" else POLICIES[name](model)
    totals = Policy.totals

    def watched(self: Any, cache: CompressedCache, *how: Any) -> Any:
        """Called when a layer, or all of them, has been read, before anything of it is evicted."""
        held.append(cache.nbytes)
        return totals(self, cache, *how)

    monkeypatch.setattr(Policy, "totals", watched)
    cache = prefill(model, ids, policy=policy, keep=0.1, window=0)
    one_layer, window = cache.full_nbytes / 3, policy.capture_spec.window
    if name == "at the end":
        assert min(held) >= 3 * one_layer
        return
    recorded = 2 * 4 * window * 16 * 4 + 2 * window * 8  # queries of all heads and their positions
    tables = 3 * 2 * 2 * 2 * 8
    kept_before = [0, *(cache.budgets.sum((1, 2)).cumsum(0) * (2 * 16 * 4 + 4)).tolist()]
    assert len(held) == 3
    for at, most in enumerate(held):
        assert one_layer <= most <= one_layer + kept_before[at] + recorded + tables
    assert held[-1] < 1.5 * one_layer
