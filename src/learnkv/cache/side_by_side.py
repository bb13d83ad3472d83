"""Rows of several caches as the rows of one, so that one pass of the model continues all of them."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.cache.capture import Capture
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import NOTHING, CompressedLayer
from learnkv.cache.states import Kept
from learnkv.cache.storage import Segment
from learnkv.errors import UserError


def can_join(cache: CompressedCache) -> bool:
    """Whether a cache can be one of `side_by_side`: compressed, 16-bit or wider entries alone, and nothing read since.

    Caches with tiers, pages, a summary of what was evicted, online eviction, an adapter, images or layers of other
    kinds cannot.
    """
    layers = cache.compressed_layers()
    special = cache.schedule, cache.adapter, cache.images, cache.pending, cache.protection
    if cache.budgets is None or cache.is_hybrid or any(part is not None for part in special):
        return False
    return all(_is_plain(layer) for layer in layers)


def _is_plain(layer: CompressedLayer) -> bool:
    state = layer.state
    if not isinstance(state, Kept) or layer.tail_length or layer.merged_tokens or layer.decode_capture is not None:
        return False
    return state.page_index is None and state.evicted is None and not state.tiers


def side_by_side(caches: Sequence[CompressedCache]) -> CompressedCache:
    """A cache with the rows of all `caches`, those of the first one first; kept entries are copied.

    Args:
        caches: of the same model, with prompts in equally many slots; each of them as `can_join` wants it.

    Raises:
        UserError: for a cache that cannot be joined, or one of another model or other slots than the first.
    """
    first = caches[0]
    for number, cache in enumerate(caches):
        if not can_join(cache):
            raise UserError(f"cache {number} cannot be joined: expected entries of a prompt that was compressed, alone")
        if _sizes(cache) != _sizes(first):
            raise UserError(
                f"cache {number} has other layers, slots or number formats than the first: cannot be joined"
            )
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
    for place in first.compressible:
        joined.layers[place] = _joined_layer([cache.layers[place] for cache in caches])
    return joined


def _sizes(cache: CompressedCache) -> tuple[object, ...]:
    layers = cache.compressed_layers()
    about = [(layer.sizes, layer.prompt_slots, layer.dtype, layer.device) for layer in layers]
    return cache.model_name, cache.compressible, about


def _joined_layer(layers: Sequence[CompressedLayer]) -> CompressedLayer:
    twin = copy.copy(layers[0])
    twin.capture, twin.tail = Capture(NOTHING), None
    twin.state = Kept(_joined([layer.segment for layer in layers if layer.segment is not None]))
    return twin


def _joined(storage: Sequence[Segment]) -> Segment:
    """Rows of all segments in one pool; what scorers would need to evict again is left out."""
    length = torch.cat([segment.length for segment in storage])
    spans: list[tuple[Segment, slice]] = []
    for segment in storage:
        rows = zip(segment.offset.tolist(), segment.length.tolist(), strict=True)
        spans += [(segment, slice(offset, offset + count)) for offset, count in rows]

    def pool(name: str) -> Tensor:
        return torch.cat([getattr(segment, name)[span] for segment, span in spans])

    offset = length.cumsum(0) - length
    longest = max(segment.longest for segment in storage)
    return Segment(pool("keys"), pool("values"), pool("positions"), offset, length, longest)
