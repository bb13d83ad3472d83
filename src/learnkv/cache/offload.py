"""A prompt whose keys and values the host holds while the model runs on another device."""

from dataclasses import replace

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.states import Kept
from learnkv.errors import UserError


def offload(cache: CompressedCache) -> None:
    """Move the prompt's keys and values to the host, in place; attention copies them back layer by layer.

    Tables, positions and the tail stay on the device. Forks that share the prompt keep it there as long as they live.

    Raises:
        UserError: for a cache with pages, entries in fewer bits, a residual or gates, which only a device reads.
    """
    cache.seal()
    for layer in cache.compressed_layers():
        state = layer.state
        if not isinstance(state, Kept) or state.page_index is not None or state.tiers or state.evicted is not None:
            raise UserError("offload: expected a cache with all entries of its prompt, as prefill returns it")
        segment = replace(state.segment, keys=_to_host(state.segment.keys), values=_to_host(state.segment.values))
        layer.state = Kept(segment)
        layer.capture.forget()


def _to_host(pool: Tensor) -> Tensor:
    """A copy in the host's memory, in pages that a GPU reads without a further copy; itself where it lies there."""
    if pool.device.type == "cpu":
        return pool
    host = torch.empty(pool.shape, dtype=pool.dtype, pin_memory=pool.device.type == "cuda")
    return host.copy_(pool)
