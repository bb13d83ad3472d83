"""What holds for every scorer with every allocator: any two of them make a policy."""

import functools
from typing import Any

import pytest
import torch
from support.components import ALLOCATORS, KNOWS_ITS_HEAD, SCORERS, build
from support.models import assert_kept_alike, assert_logits_close, attached, kept_mask, padded, tokens
from support.models import build as build_model
from transformers import PreTrainedModel

from learnkv import CompressedCache, Policy, attach, continuation, prefill
from learnkv.allocators import Allocator
from learnkv.scorers import Constant, Scorer

KEEP, SHAPE = 0.35, (3, 2, 2, 16, 48)
LAYERS, HEADS, *_ = SHAPE
LENGTHS = (53, 34)
SWAPPED = [1, 0]

PAIRS = [pytest.param(one, other, id=f"{one.__name__}-{other.__name__}") for one in SCORERS for other in ALLOCATORS]


@functools.cache
def policy_of(scorer: type[Scorer], allocator: type[Allocator]) -> Policy:
    return Policy(scorer_of(scorer), build(allocator, *SHAPE), sinks=2, recent=3)


@functools.cache
def scorer_of(cls: type[Scorer]) -> Scorer:
    return build(cls, *SHAPE)


@functools.cache
def swapped_model() -> PreTrainedModel:
    """The same function of a prompt with the two kv heads of every layer in each other's place."""
    model = build_model("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(attention, name).weight
            weight.data = weight.data.unflatten(0, (HEADS, -1))[SWAPPED].flatten(0, 1)
        weight = attention.o_proj.weight
        weight.data = weight.data.unflatten(1, (HEADS, -1))[:, SWAPPED].flatten(1)
    return attach(model)


@functools.cache
def read(which: str) -> CompressedCache:
    """The two prompts together, also in chunks, the shorter one alone, or both in the model whose heads are swapped."""
    rows = [tokens(1, length, seed=8)[0] for length in LENGTHS]
    ids, mask = padded(rows[1:] if which == "alone" else rows)
    model = swapped_model() if which == "swapped" else attached("llama")
    every = [Policy(scorer_of(scorer)) for scorer in SCORERS] + [Policy(None, build(a, *SHAPE)) for a in ALLOCATORS]
    return prefill(model, ids, mask, window=max(LENGTHS), policies=every, chunk_size=20 if which == "chunks" else None)


def masked(cache: CompressedCache, small: CompressedCache) -> CompressedCache:
    """The whole prompt, of which attention sees what `small` holds and nothing else."""
    whole = cache.fork()
    gates = torch.zeros(LAYERS, len(LENGTHS), HEADS, max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        gates[:, row, :, max(LENGTHS) - length :] = kept_mask(small, row).float()
    for layer, gate in zip(whole.compressed_layers(), gates, strict=True):
        layer.gate(gate)
    return whole


@pytest.mark.parametrize(("scorer", "allocator"), PAIRS)
def test_any_two_make_a_policy(scorer: type[Any], allocator: type[Any]) -> None:
    policy, cache = policy_of(scorer, allocator), read("together")
    plan = policy.plan(cache.fork(), keep=KEEP)
    small = policy.compress(cache.fork(), keep=KEEP)

    assert small.budgets.sum((0, 2)).tolist() == [round(KEEP * n * LAYERS * HEADS) for n in LENGTHS]
    for row, length in enumerate(LENGTHS):
        held = kept_mask(small, row)
        assert torch.equal(held.sum(-1), small.budgets[:, row])
        assert held[..., :2].all()
        assert held[..., length - 3 :].all()

    said = tokens(len(LENGTHS), 3, seed=9)
    model = attached("llama")
    assert_logits_close(continuation(model, said, small.fork()), continuation(model, said, masked(cache, small)))

    alone = policy.compress(read("alone").fork(), keep=KEEP)
    chunks = policy.compress(read("chunks").fork(), keep=KEEP)
    assert_kept_alike(small, 1, alone, 0, plan.scores[:, 1, :, -LENGTHS[1] :])
    for row, length in enumerate(LENGTHS):
        assert_kept_alike(small, row, chunks, row, plan.scores[:, row, :, -length:])

    # Where all entries are alike, those of the first head are taken before those of the second.
    if not {scorer, allocator} & KNOWS_ITS_HEAD and scorer is not Constant:
        swapped = policy.plan(read("swapped").fork(), keep=KEEP)
        # Where both heads have the same scores, the last entry goes to the first of them, whichever that is.
        tied = torch.equal(plan.scores[:, :, 0], plan.scores[:, :, 1])
        torch.testing.assert_close(swapped.wanted[:, :, SWAPPED], plan.wanted, rtol=1e-3, atol=1.001 if tied else 1e-3)
