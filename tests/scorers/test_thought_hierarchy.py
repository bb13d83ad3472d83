"""Mean attention of the latest queries, shared by all heads, and entries that are set aside for ever."""

import pytest
import torch
from support.models import attached, tokens

from learnkv import CompressedCache, Policy, continuation, load_policy, prefill
from learnkv.errors import UserError
from learnkv.scorers import TOVA, ThoughtHierarchy
from learnkv.scorers.thought_hierarchy import Offloaded


def kept(cache: CompressedCache) -> set[frozenset[int]]:
    """The different sets of positions that heads keep."""
    heads = ((layer, head) for layer in cache.compressible for head in (0, 1))
    return {frozenset(cache.kept_positions(layer, 0, head).tolist()) for layer, head in heads}


def offloaded(cache: CompressedCache, layer: int, head: int) -> set[int]:
    segment = cache.compressed_layers()[layer].segment
    positions, begin = cache.kept_positions(layer, 0, head), int(segment.offset[head])
    flags = segment.statistics[Offloaded()][begin : begin + len(positions), 0]
    return set(positions[flags > 0].tolist())


def test_of_a_prompt_it_is_the_attention_of_the_last_query() -> None:
    model, scorer = attached("llama"), ThoughtHierarchy()
    policy = Policy(scorer, evict_interval=8)
    cache = prefill(model, tokens(1, 40), policies=[policy, Policy(TOVA())], chunk_size=13)
    layers = [layer.observation() for layer in cache.compressed_layers()]
    scores = torch.stack([scorer(obs) for obs in layers])
    tova = torch.stack([TOVA()(obs) for obs in layers])
    torch.testing.assert_close(scores.mean(2), tova[:, :, 0])
    ranked = scorer.refine_layers(layers, scores, torch.zeros(scores.shape[:3]))
    order = tova.mean((0, 2))[0].argsort(descending=True)
    assert ranked[0, 0, 0].argsort(descending=True).tolist() == order.tolist()


def test_all_heads_keep_the_same_tokens_and_what_is_offloaded_stays() -> None:
    """The budget is exact after every eviction, and no token that was set aside is evicted by a later one."""
    model = attached("llama")
    policy = Policy(ThoughtHierarchy(pin_prompt=False, window=4, resident=0.25), evict_interval=8)
    cache = prefill(model, tokens(1, 60), policy=policy, keep=0.5)
    assert not offloaded(cache, 0, 0)
    before: set[int] = set()
    for step in range(4):
        continuation(model, tokens(1, 8, seed=step), cache)
        (same,) = kept(cache)
        assert len(same) == 30
        aside = offloaded(cache, 0, 0)
        assert aside == offloaded(cache, 2, 1)
        assert before <= aside <= same
        before = aside
    assert before
    assert before != same


def test_a_pinned_prompt_is_evicted_only_where_nothing_else_is_left() -> None:
    model = attached("llama")
    policy = Policy(ThoughtHierarchy(sinks=2, window=4), sinks=0, recent=0, evict_interval=8)
    cache = prefill(model, tokens(1, 40), policy=policy, keep=0.5)
    (prompt,) = kept(cache)
    continuation(model, tokens(1, 8, seed=1), cache)
    (same,) = kept(cache)
    new = set(range(40, 48))
    # Of eight new tokens the first two and the last four are no candidates, so that six of the prompt go as well.
    assert {40, 41, 44, 45, 46, 47} <= same & new
    assert len(prompt - same) == 8 - len(new - same) == 6


def test_the_shipped_policy_has_the_interval_of_the_original() -> None:
    policy = load_policy("thought_hierarchy")
    assert (policy.evict_interval, ThoughtHierarchy().last, policy.scorer.resident) == (64, 128, 0.5)


def test_what_is_no_part_is_refused() -> None:
    with pytest.raises(UserError, match=r"resident=1\.5"):
        ThoughtHierarchy(resident=1.5)
