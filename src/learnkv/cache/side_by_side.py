"""Rows of several caches as the rows of one, so that one pass of the model continues all of them."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from learnkv.cache.capture import Capture
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import NOTHING, CompressedLayer
from learnkv.cache.states import Kept
from learnkv.cache.storage import Segment
from learnkv.cache.tiers import StoredTier
from learnkv.core.codec import Encoded
from learnkv.core.component import class_path
from learnkv.errors import UserError


def joinable(cache: CompressedCache) -> tuple[str, ...] | None:
    """What a cache has to have in common with others of `side_by_side`: its tiers; None where it cannot be joined.

    Joined are caches that were compressed and have read nothing since. Those with pages, a summary of what was evicted,
    online eviction, an adapter, images, layers of other kinds, or codes that depend on other entries cannot be.
    """
    layers = cache.compressed_layers()
    special = cache.schedule, cache.adapter, cache.images, cache.pending, cache.protection
    if cache.budgets is None or cache.is_hybrid or any(part is not None for part in special):
        return None
    if not all(_is_plain(layer) for layer in layers):
        return None
    codecs = [codec for layer in layers for tier in _tiers(layer) for codec in tier.level]
    return (f"narrow {cache.narrow}", *(f"{class_path(codec)} {codec.spec()}" for codec in codecs))


def _is_plain(layer: CompressedLayer) -> bool:
    state = layer.state
    if not isinstance(state, Kept) or layer.tail_length or layer.merged_tokens or layer.decode_capture is not None:
        return False
    independent = all(codec.independent for tier in state.tiers for codec in (tier.level.keys, tier.level.values))
    return state.page_index is None and state.evicted is None and independent


def _tiers(layer: CompressedLayer) -> tuple[StoredTier, ...]:
    assert isinstance(layer.state, Kept)
    return layer.state.tiers


def side_by_side(caches: Sequence[CompressedCache]) -> CompressedCache:
    """A cache with the rows of all `caches`, those of the first one first; kept entries are copied.

    Args:
        caches: of the same model, with prompts in equally many slots, alike for `joinable`.

    Raises:
        UserError: for a cache that cannot be joined, or one of another model, other slots or tiers than the first.
    """
    first = caches[0]
    for number, cache in enumerate(caches):
        if joinable(cache) is None:
            raise UserError(f"cache {number} cannot be joined: expected entries of a prompt that was compressed, alone")
        if _sizes(cache) != _sizes(first):
            raise UserError(f"cache {number} has other layers, slots, formats or tiers than the first: not joined")
    joined = copy.copy(first)
    joined.decode_loop, joined.no_entries, joined.compression, joined.expected_pass = None, {}, None, None
    joined.prompt_lengths = [length for cache in caches for length in cache.prompt_lengths]
    joined.covered = []
    joined.invalid = tuple(part for cache in caches for part in cache.invalid)
    joined.budgets = torch.cat([cache.budgets for cache in caches if cache.budgets is not None], 1)
    joined.tail_mask, joined.tail_padded, joined.token_ids = None, False, None
    if all(cache.token_ids is not None for cache in caches):
        known = [cache.token_ids for cache in caches if cache.token_ids is not None]
        joined.token_ids = torch.cat([ids for ids, _ in known]), torch.cat([later for _, later in known])
    joined.layers = list(first.layers)
    rows = len(joined.prompt_lengths) * first.compressed_layers()[0].heads
    nothing = torch.zeros(rows, dtype=torch.int64, device=first.compressed_layers()[0].device)
    for place in first.compressible:
        joined.layers[place] = _joined_layer([cache.layers[place] for cache in caches], nothing)
    return joined


def _sizes(cache: CompressedCache) -> tuple[object, ...]:
    layers = cache.compressed_layers()
    about = [(layer.sizes, layer.prompt_slots, layer.dtype, layer.device) for layer in layers]
    return cache.model_name, cache.compressible, joinable(cache), about


def _joined_layer(layers: Sequence[CompressedLayer], nothing: Tensor) -> CompressedLayer:
    """A layer with all rows; `nothing` is the table of a segment whose entries are all in tiers, of all layers."""
    twin = copy.copy(layers[0])
    twin.capture, twin.tail = Capture(NOTHING), None
    storage = [layer.segment for layer in layers if layer.segment is not None]
    tiers = tuple(_joined_tier(parts) for parts in zip(*map(_tiers, layers), strict=True))
    if all(segment.length is segment.offset for segment in storage):
        empty = replace(storage[0], offset=nothing, length=nothing)
        twin.state = Kept(empty, tiers=tiers)
    else:
        keys, values = (_gathered(storage, [getattr(part, name) for part in storage]) for name in ("keys", "values"))
        twin.state = Kept(_joined(storage, keys, values), tiers=tiers)
    return twin


def _joined(storage: Sequence[Segment], keys: Tensor, values: Tensor) -> Segment:
    """Rows of all segments behind each other; what scorers would need to evict again is left out."""
    length = torch.cat([segment.length for segment in storage])
    offset = (length.cumsum(0) - length).to(length.dtype)
    positions = _gathered(storage, [segment.positions for segment in storage])
    return Segment(keys, values, positions, offset, length, max(segment.longest for segment in storage))


def _joined_tier(tiers: Sequence[StoredTier]) -> StoredTier:
    """Rows of tiers of one level, whose codecs store every entry by itself."""
    first, storage = tiers[0], [tier.entries for tier in tiers]
    rows = _joined(storage, first.entries.keys, first.entries.values)
    counts = tuple(rows.length.tolist())

    def encoded(parts: Sequence[Encoded]) -> Encoded:
        tensors = {name: _gathered(storage, [part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return replace(parts[0], tensors=tensors, entries=counts)

    keys, values = encoded([tier.keys for tier in tiers]), encoded([tier.values for tier in tiers])
    return StoredTier(first.level, keys, values, rows, first.heads)


def _gathered(storage: Sequence[Segment], parts: Sequence[Tensor]) -> Tensor:
    """The entries of all rows out of what each segment has of them, one row behind the other (host sync)."""
    return torch.cat([part[span] for segment, part in zip(storage, parts, strict=True) for span in _spans(segment)])


def _spans(segment: Segment) -> Iterator[slice]:
    for offset, count in zip(segment.offset.tolist(), segment.length.tolist(), strict=True):
        yield slice(offset, offset + count)
