"""In how many bits a compressed cache has its entries, by head and by position in the prompt."""

from typing import TypedDict

import torch

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.states import Kept

BINS = 32
"""Equal parts of a prompt."""
_DIGITS = 3


class StoredBits(TypedDict):
    """Bits per number of an entry's key and value, codes with their scales; positions and tables not counted."""

    bits: list[list[float]]
    """[L][H] mean over the kept entries of each head, 0 where there are none."""
    bits_by_position: list[float]
    """[BINS] mean over the entries of all heads in each part of the prompt, an evicted one at 0."""


def stored_bits(cache: CompressedCache, row: int) -> StoredBits:
    """Bits of the entries of a batch row, right after compression (host sync)."""
    layers, length = cache.compressed_layers(), cache.prompt_lengths[row]
    dims = [channels for _, channels, _ in cache.layer_sizes()]
    by_head = torch.zeros(len(layers), layers[0].heads, dtype=torch.float64)
    counts = torch.zeros_like(by_head)
    by_position = torch.zeros(length, dtype=torch.float64)
    for layer_idx, layer in enumerate(layers):
        assert isinstance(layer.state, Kept)
        parts = [(8.0 * layer.state.segment.keys.element_size(), layer.state.segment)]
        parts += [(tier.level.bits(dims[layer_idx]), tier.entries) for tier in layer.state.tiers]
        for bits, segment in parts:
            for head in range(layer.heads):
                positions = segment.row_positions(row * layer.heads + head).long().cpu()
                by_head[layer_idx, head] += bits * len(positions)
                counts[layer_idx, head] += len(positions)
                by_position[positions] += bits
    share = torch.arange(length) * BINS // length
    of_bins = torch.zeros(BINS, dtype=torch.float64).scatter_add_(0, share, by_position)
    entries = torch.bincount(share, minlength=BINS).clamp_min(1) * by_head.numel()
    return {
        "bits": (by_head / counts.clamp_min(1)).round(decimals=_DIGITS).tolist(),
        "bits_by_position": (of_bins / entries).round(decimals=_DIGITS).tolist(),
    }
