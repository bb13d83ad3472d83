"""Two caches of one text: after its prompt, one takes over what the other has read."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.states import Kept
from learnkv.cache.storage import DecodeBuffer
from learnkv.errors import UserError


def check_same_text(cache: CompressedCache, draft: CompressedCache) -> None:
    """Raise UserError unless `draft` is another cache of the same prompts that has read as much after them."""
    if draft is cache:
        raise UserError("draft: expected a compressed fork, got the cache itself: policy.compress(cache.fork(), …)")
    if draft.prompt_lengths != cache.prompt_lengths:
        raise UserError(f"draft of prompts of {draft.prompt_lengths} tokens, the cache's have {cache.prompt_lengths}")
    if draft.continuation_length != cache.continuation_length:
        raise UserError(
            f"draft has read {draft.continuation_length} tokens after the prompt, the cache "
            f"{cache.continuation_length}: expected a fork that was made before, and used together since"
        )


def check_whole(cache: CompressedCache) -> None:
    """Raise UserError for a cache that does not hold, as they are, all entries of its prompt (host sync)."""
    if cache.schedule is not None:
        raise UserError("cache: expected one that keeps all entries; this one evicts while tokens are added")
    for layer in cache.compressed_layers():
        state = layer.state
        plain = isinstance(state, Kept) and state.page_index is None and not state.tiers
        if not plain or int(layer.attended_entries().sum()) != layer.heads * sum(cache.prompt_lengths):
            raise UserError("cache: expected all entries, as prefill returns them; this one was compressed")


def copy_tail(draft: CompressedCache, cache: CompressedCache, begin: int) -> None:
    """Let `draft` have read, from slot `begin` after the prompt on, what `cache` has, with its keys and values."""
    for layer, other in zip(draft.compressed_layers(), cache.compressed_layers(), strict=True):
        assert other.tail is not None
        keys, values = other.tail.keys[:, :, begin:], other.tail.values[:, :, begin:]
        if layer.tail is None:
            layer.tail = DecodeBuffer.empty_like(keys, values)
        layer.tail.crop(begin)
        if layer.page_index is not None:
            layer.page_index.crop(begin)
        layer.tail.append(keys, values)
    copy_others(draft, cache)
    draft.tail_mask, draft.tail_padded, draft.token_ids = cache.tail_mask, cache.tail_padded, cache.token_ids


def copy_others(draft: CompressedCache, cache: CompressedCache) -> None:
    """Give `draft` the sliding layers and the states of `cache`, which are compressed in neither."""
    for index in cache.sliding:
        draft.layers[index] = copy.copy(cache.layers[index])
    for layer, other in zip(draft.state_layers(), cache.state_layers(), strict=True):
        layer.take_states(other)


def sliding_layers(cache: CompressedCache) -> list[Any]:
    """Copies of the sliding layers as they are now; transformers replaces their tensors and changes none in place."""
    return [copy.copy(cache.layers[index]) for index in cache.sliding]


def rewind_sliding(cache: CompressedCache, before: Sequence[Any], slots: int, keep: int) -> None:
    """Let sliding layers, which were as `before` and have read `slots` more since, have read `keep` of them only."""
    for layer, old in zip([cache.layers[index] for index in cache.sliding], before, strict=True):
        window = layer.sliding_window - 1
        for name in ("keys", "values"):
            new = getattr(layer, name)[:, :, -slots:][:, :, :keep]
            setattr(layer, name, torch.cat([getattr(old, name), new], 2)[:, :, -window:])
        layer.cumulative_length = old.cumulative_length + keep
