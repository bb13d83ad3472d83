"""What must hold whatever the model: reading in chunks, padding, batches, eviction and masking compute the same."""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from support.configs import FAMILIES, HYBRIDS, STATES, WINDOW
from support.models import (
    HEURISTICS,
    LEARNED,
    assert_kept_alike,
    assert_logits_close,
    attached,
    heuristic,
    kept,
    kept_mask,
    oracle,
    padded,
    plain,
    policy_for,
    read,
    tokens,
)
from torch import Tensor
from transformers import DynamicCache

from learnkv import CompressedCache, continuation, load_policy, prefill
from learnkv.errors import UserError
from learnkv.policy.policy import Policy

every_family = pytest.mark.parametrize("family", FAMILIES)


def policies() -> Iterator[Any]:
    """All; with other releases of transformers one of those that capture the same kinds of things, and the learned."""
    known = set()
    for name in HEURISTICS:
        spec = heuristic(name).capture_spec
        gathered = (spec.reads_hidden, spec.hidden, spec.token_ids, spec.functions, bool(spec.statistics))
        kind = (spec.window > 0, *gathered, frozenset(map(type, spec.extra_passes)))
        yield pytest.param(name, marks=() if kind in known else pytest.mark.compat)
        known.add(kind)
    yield from (pytest.param(name, marks=pytest.mark.compat) for name in LEARNED)


every_policy = pytest.mark.parametrize("name", list(policies()))


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def untouched(family: str, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of the untouched model."""
    model = plain(family)
    return model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits


@functools.cache
def read_once(family: str, *lengths: int, seed: int) -> CompressedCache:
    """Left-padded prompts of these lengths, or one without padding, read for all policies: for forks."""
    prompts = [tokens(1, length, seed=seed)[0] for length in lengths]
    return read(attached(family), *(padded(prompts) if len(prompts) > 1 else [prompts[0][None]]))


@pytest.mark.compat
@every_family
@pytest.mark.parametrize("chunk_size", [None, 1, 7])
def test_keeping_everything_is_the_full_cache(family: str, chunk_size: int | None) -> None:
    ids, model = tokens(2, 60), attached(family)
    whole = untouched(family, ids)
    cache = prefill(model, ids[:, :30], chunk_size=chunk_size)
    for spend in ({"keep": 1.0}, {"budget": 30}, {"budget": 1000}):
        kept_all = policy_for("snapkv", model).compress(cache.fork(), **spend)
        assert kept_all.spent == [1.0, 1.0]
        assert_logits_close(continuation(model, ids[:, 30:31], kept_all), whole[:, 30:31])
        assert_logits_close(continuation(model, ids[:, 31:], kept_all), whole[:, 31:])
    assert_logits_close(continuation(model, ids[:, 30:], load_policy("full").compress(cache, keep=0.1)), whole[:, 30:])


def check_masking(family: str, name: str, keep: float) -> CompressedCache:
    """Continuations of 1, 2, 24 and 64 tokens of left-padded rows, against each row alone with a dense mask."""
    model, policy = attached(family), policy_for(name, attached(family))
    prompts = [tokens(1, length, seed=1)[0] for length in (70, 41)]
    said = tokens(2, 91, seed=2)
    cache = policy.compress(read_once(family, 70, 41, seed=1).fork(), keep=keep)
    ours = torch.cat([continuation(model, part, cache) for part in said.split([1, 2, 24, 64], 1)], 1)
    for row, prompt in enumerate(prompts):
        mask = kept_mask(cache, row)
        assert mask[cache.compressible].sum() == round(keep * len(prompt) * mask[cache.compressible][..., 0].numel())
        assert_logits_close(ours[row], oracle(family)(prompt, mask, said[row]))
    return cache


@pytest.mark.compat
@every_family
@pytest.mark.parametrize("name", ["adakv", "tokens"])
def test_evicting_is_masking_in_every_family(family: str, name: str) -> None:
    cache = check_masking(family, name, 0.3)
    assert cache.budgets.unique().numel() > 1  # ragged


@every_policy
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_evicting_is_masking_under_every_policy(family: str, name: str) -> None:
    check_masking(family, name, 0.15)


@pytest.mark.compat
def test_the_oracle_sees_a_difference_when_one_entry_is_kept_more() -> None:
    prompt, said = tokens(1, 40)[0], tokens(1, 5)[0]
    cache = load_policy("snapkv").compress(prefill(attached("llama"), prompt[None]), keep=0.3)
    mask = kept_mask(cache, 0)
    first = oracle("llama")(prompt, mask, said)
    mask[2, 1, int((~mask[2, 1]).nonzero()[0])] = True
    assert (oracle("llama")(prompt, mask, said) - first).abs().max() > 1e-3


@pytest.mark.compat
@pytest.mark.parametrize(
    ("family", "chunk_size"),
    [("llama", 1), ("gemma3", 1), ("llama", 40), ("gemma3", 40), *((family, 9) for family in FAMILIES)],
)
def test_reading_in_chunks_is_reading_at_once(family: str, chunk_size: int) -> None:
    model, prompts = attached(family), [tokens(1, length, seed=3)[0] for length in (67, 20)]
    used = [policy_for(name, model) for name in ("snapkv", "conditioned", "h2o")]
    whole, parts = (
        prefill(model, *padded(prompts), policies=used, window=20, chunk_size=size) for size in (None, chunk_size)
    )
    for one, other in zip(whole.compressed_layers(), parts.compressed_layers(), strict=True):
        torch.testing.assert_close(one.prompt.keys[:, :, -20:], other.prompt.keys[:, :, -20:], rtol=0, atol=1e-4)
        torch.testing.assert_close(
            one.capture.queries[..., -20:, :], other.capture.queries[..., -20:, :], rtol=0, atol=1e-4
        )
    for policy in used:
        ours, theirs = (planned(policy, cache) for cache in (whole, parts))
        check_same_plan(ours, [0, 1], theirs, [0, 1])


@pytest.mark.compat
@pytest.mark.parametrize("chunk_size", [4, 16, 31, 32])
def test_prompts_without_padding_are_read_in_chunks_of_any_length(chunk_size: int) -> None:
    model, ids = attached("llama"), tokens(2, 33)
    whole, parts = (prefill(model, ids, chunk_size=size) for size in (None, chunk_size))
    one, other = (planned(policy_for("adakv", model), cache) for cache in (whole, parts))
    check_same_plan(one, [0, 1], other, [0, 1])


class Planned(NamedTuple):
    """What a policy does with a cache."""

    scores: Tensor
    """[L, B, H, S]"""
    small: CompressedCache


def planned(policy: Policy, cache: CompressedCache) -> Planned:
    return Planned(policy.plan(cache.fork(), keep=0.25).scores, policy.compress(cache.fork(), keep=0.25))


def check_same_plan(one: Planned, rows: list[int], other: Planned, other_rows: list[int]) -> None:
    """The same scores and kept entries in rows of two caches, whose padding may differ."""
    for row, other_row in zip(rows, other_rows, strict=True):
        n = one.small.prompt_lengths[row]
        ours, theirs = one.scores[:, row, :, -n:], other.scores[:, other_row, :, -n:]
        assert ours.isfinite().any()
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        assert_kept_alike(one.small, row, other.small, other_row, ours)


@every_policy
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_left_padded_row_is_planned_as_alone(family: str, name: str) -> None:
    lengths = (61, 50, 33, 17)
    policy, whole = policy_for(name, attached(family)), read_once(family, *lengths, seed=4)
    assert whole.prompt_lengths == [61, 50, 33, 17]
    together = planned(policy, whole)
    for row, length in enumerate(lengths):
        check_same_plan(planned(policy, read_once(family, length, seed=4)), [0], together, [row])


@pytest.mark.compat
@every_family
def test_a_left_padded_row_continues_as_alone(family: str) -> None:
    model, policy = attached(family), policy_for("adakv", attached(family))
    prompts, said = [tokens(1, length, seed=5)[0] for length in (55, 19)], tokens(2, 9, seed=6)
    ids, mask = padded(prompts)
    extra = torch.zeros(2, 3, dtype=torch.long)  # both rows padded
    cache = policy.compress(prefill(model, torch.cat([extra, ids], 1), torch.cat([extra, mask], 1)), keep=0.4)
    together = continuation(model, said, cache)
    for row, prompt in enumerate(prompts):
        alone = policy.compress(prefill(model, prompt[None]), keep=0.4)
        assert kept(cache, row) == kept(alone, 0)
        assert_logits_close(together[row : row + 1], continuation(model, said[row : row + 1], alone))


@pytest.mark.compat
@every_family
def test_live_caches_do_not_know_each_other(family: str) -> None:
    model, prompts, said = attached(family), [tokens(1, n, seed=7) for n in (48, 31)], tokens(1, 12, seed=8)
    policies = [policy_for("adakv", model), policy_for("streaming_llm", model)]

    def alone(which: int) -> Tensor:
        cache = policies[which].compress(prefill(model, prompts[which]), keep=0.3)
        return torch.cat([continuation(model, one, cache) for one in said.split(1, 1)], 1)

    expected = [alone(0), alone(1)]
    first = policies[0].compress(prefill(model, prompts[0]), keep=0.3)
    second = policies[1].compress(prefill(model, prompts[1]), keep=0.3)
    ours: list[list[torch.Tensor]] = [[], []]
    for step, one in enumerate(said.split(1, 1)):
        ours[0].append(continuation(model, one, first))
        if step == 4:
            prefill(model, tokens(3, 25, seed=9))
            model(input_ids=tokens(2, 10), past_key_values=DynamicCache(config=model.config))
        ours[1].append(continuation(model, one, second))
    assert torch.equal(torch.cat(ours[0], 1), expected[0])
    assert torch.equal(torch.cat(ours[1], 1), expected[1])


@pytest.mark.compat
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in STATES])
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_of_different_lengths_continue_as_alone(family: str, side: str) -> None:
    model, policy = attached(family), policy_for("snapkv", attached(family))
    size = 4 if family in HYBRIDS else 15  # all within the window of the sliding layers
    prompts = [tokens(1, length, seed=10)[0] for length in (2 * size, 3 * size, 2 * size + 1)]
    questions = [tokens(1, length, seed=11)[0] for length in (size, 1, size // 2)]
    more = tokens(3, 2, seed=12)
    cache = policy.compress(prefill(model, *padded(prompts)), keep=0.4)
    ids, mask = padded(questions, side)
    logits = [continuation(model, ids, cache, mask), continuation(model, more, cache)]
    for row, (prompt, question) in enumerate(zip(prompts, questions, strict=True)):
        alone = policy.compress(prefill(model, prompt[None]), keep=0.4)
        assert_logits_close(logits[0][row][mask[row].bool()], continuation(model, question[None], alone)[0])
        assert_logits_close(logits[1][row], continuation(model, more[row : row + 1], alone)[0])


@pytest.mark.compat
def test_gaps_that_a_sliding_layer_would_count_are_refused() -> None:
    model, (ids, mask) = attached("gemma3"), padded([tokens(1, 5)[0], tokens(1, 2)[0]], "right")
    cache = prefill(model, tokens(2, WINDOW))
    continuation(model, ids, cache, mask)  # nothing follows the padding yet
    with pytest.raises(UserError, match=f"last {WINDOW} slots"):
        continuation(model, tokens(2, 1), cache)


@pytest.mark.compat
@pytest.mark.parametrize("family", STATES)
def test_gaps_that_a_state_would_count_are_refused(family: str) -> None:
    model, questions = attached(family), [tokens(1, 5)[0], tokens(1, 2)[0]]
    with pytest.raises(UserError, match="states that padding would change"):
        continuation(model, *_behind(prefill(model, tokens(2, 9)), *padded(questions, "left")))
    cache = prefill(model, tokens(2, 9))
    continuation(model, *_behind(cache, *padded(questions, "right")))  # nothing follows the padding yet
    with pytest.raises(UserError, match="questions of one length"):
        continuation(model, tokens(2, 1), cache)


def _behind(cache: CompressedCache, ids: Tensor, mask: Tensor) -> tuple[Tensor, CompressedCache, Tensor]:
    """Arguments of `continuation`."""
    return ids, cache, mask


@pytest.mark.compat
@every_family
def test_a_relaxed_cache_computes_what_is_deployed(family: str) -> None:
    model, ids, said = attached(family), tokens(2, 45, seed=13), tokens(2, 20, seed=14)
    for name in ("snapkv", "budgets"):
        policy, whole = policy_for(name, model), prefill(model, ids)
        small, relaxed = policy.compress(whole.fork(), keep=0.3), policy.relax(whole, keep=0.3)
        assert [kept(small, row) for row in (0, 1)] == [kept(relaxed, row) for row in (0, 1)]
        assert relaxed.spent == small.spent
        assert_logits_close(continuation(model, said, relaxed), continuation(model, said, small))
