"""Eviction: the highest-scored entries of layers move into a pool of exactly their number."""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from learnkv.cache.layer import CompressedLayer
from learnkv.cache.storage import Segment
from learnkv.core.observation import CaptureSpec, Statistic
from learnkv.ops.gather_kv import Rerotation, gather_kv
from learnkv.ops.select import select

Rerotate = Literal["start", "end"]
"""Positions that keys are rotated to: consecutive ones from 0 on, or up to the last token's."""


def compact(
    layers: list[CompressedLayer],
    scores: Tensor,
    budgets: Tensor,
    total: int,
    decode_capture: CaptureSpec | None,
    rerotate: Rerotate | None,
) -> Iterator[tuple[int, Segment]]:
    """Number of each layer and the segment of its heads' `budgets[l, b, h]` highest-scored entries.

    Layers on one device and of one head size share a pool. Segments are computed one by one, so that a layer's prompt
    can be freed before the next is compacted. Where all layers share a pool there is no host sync; else the size of
    each pool is read from the device.

    Args:
        scores: [L, B, H, S] float32, +inf protected, -inf no entry.
        budgets: [L, B, H] int64.
        total: sum of `budgets`.
        decode_capture: what is captured of tokens to come.
        rerotate: give the entries of every head consecutive positions; None: their keys stay as they are.
    """
    pools = _pools(layers)
    for rows in pools:
        adjacent = len(rows) == rows[-1] - rows[0] + 1  # a view of the budgets then serves as the table of lengths
        index = slice(rows[0], rows[-1] + 1) if adjacent else rows
        size = total if len(pools) == 1 else int(budgets[index].sum())
        segments = segments_of(
            [layers[row] for row in rows], scores[index], budgets[index], size, decode_capture, rerotate
        )
        yield from zip(rows, segments, strict=True)


def _pools(layers: list[CompressedLayer]) -> list[list[int]]:
    """Numbers of the layers that share a pool."""
    pools: dict[tuple[object, int], list[int]] = {}
    for index, layer in enumerate(layers):
        keys = layer.prompt.keys
        pools.setdefault((keys.device, keys.shape[-1]), []).append(index)
    return list(pools.values())


def segments_of(
    layers: list[CompressedLayer],
    scores: Tensor,
    budgets: Tensor,
    total: int,
    decode_capture: CaptureSpec | None,
    rerotate: Rerotate | None,
    index: Tensor | None = None,
) -> Iterator[Segment]:
    """The segments of layers that share a pool; `index` [total] names the entries where scores do not."""
    like = layers[0].prompt
    device, dim = like.keys.device, like.keys.shape[-1]
    count, batch, heads, slots = scores.shape
    rows = batch * heads
    length = budgets.to(device).reshape(count, rows)
    offset = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
    if index is None:
        index = select(scores.to(device).reshape(count * rows, slots), length.flatten(), total)
    pool_keys, pool_values = like.keys.new_empty(total, dim), like.values.new_empty(total, dim)
    del like  # the first layer may be freed of its prompt
    positions = _positions(layers, index, heads, slots).to(torch.int32)
    followed = decode_capture.statistics if decode_capture is not None else frozenset()
    statistics = {statistic: _statistic(layers, statistic, index, slots) for statistic in followed}
    before, first, rotated = _rerotated(layers, index, positions, offset, length, slots, rerotate)
    for layer_idx, layer in enumerate(layers):
        keys, values = (part.reshape(rows, slots, dim) for part in (layer.prompt.keys, layer.prompt.values))
        tables = offset[layer_idx], length[layer_idx]
        segment = Segment(pool_keys, pool_values, positions, *tables, slots, statistics, rotated)
        rerotation = None
        if rerotate is not None:
            rerotation = Rerotation(before, first[layer_idx], *layer.rotation())
        gather_kv(keys, values, index, layer_idx * rows, segment.ragged, rerotation)
        yield segment


def _statistic(layers: list[CompressedLayer], statistic: Statistic, index: Tensor, slots: int) -> Tensor:
    """The statistic of the kept entries, [N, F]; heads may share it."""
    whole = torch.stack([layer.capture.statistics[statistic] for layer in layers])  # [L, B, H or 1, S, F]
    if whole.shape[2] != layers[0].heads:
        index = index // slots // layers[0].heads * slots + index % slots
    return whole.flatten(0, 3)[index]


def _positions(layers: list[CompressedLayer], index: Tensor, heads: int, slots: int) -> Tensor:
    """Positions [N] of the kept entries; before anything is evicted they are the same in all layers and heads."""
    if layers[0].prompt.positions is not None:
        return torch.stack([layer.prompt.entry_positions() for layer in layers]).flatten()[index]
    shared = layers[0].prompt.slot_positions()
    return shared[(index // slots) // heads % shared.shape[0], index % slots]


def _rerotated(
    layers: list[CompressedLayer],
    index: Tensor,
    positions: Tensor,
    offset: Tensor,
    length: Tensor,
    slots: int,
    rerotate: Rerotate | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Where kept keys are rotated from and to.

    Returns:
        Positions [N] that the kept keys are rotated to so far, the new position [L, R] of the first of every row, and
        the new positions [N] of all; the last is None where nothing is rotated.
    """
    first = torch.zeros_like(length)
    if rerotate is None:
        return positions, first, None
    before = positions
    if layers[0].prompt.rotated is not None:
        before = torch.stack([layer.prompt.key_positions() for layer in layers]).flatten()[index].to(torch.int32)
    if rerotate == "end":
        tokens = layers[0].prompt.entry_positions().amax((1, 2)) + 1
        first = tokens.repeat_interleave(layers[0].heads) - length
    rank = torch.arange(len(index), device=index.device) - offset.flatten()[index // slots]
    return before, first, (first.flatten()[index // slots] + rank).to(torch.int32)
