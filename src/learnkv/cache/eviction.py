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
"""Where keys are rotated to: consecutive positions from 0 on, or up to the last token's."""


def compact(
    layers: list[CompressedLayer],
    scores: Tensor,
    budgets: Tensor,
    total: int,
    live: CaptureSpec | None,
    rerotate: Rerotate | None,
) -> Iterator[tuple[int, Segment]]:
    """Number of each layer and the segment of its heads' `budgets[l, b, h]` highest-scored entries.

    Layers on one device and of one head size share a pool. A segment is made when it is asked for, so that a layer may
    be freed of its prompt before the next is compacted.

    Nothing waits for a device where all layers share a pool. How much each of several pools holds is looked up.

    Args:
        scores: [L, B, H, S] float32, +inf protected, -inf no entry.
        budgets: [L, B, H] int64.
        total: sum of `budgets`.
        live: what is recorded of tokens to come.
        rerotate: give the entries of every head consecutive positions; None: their keys stay as they are.
    """
    groups = _groups(layers)
    for rows in groups:
        whole = len(rows) == rows[-1] - rows[0] + 1  # a view of the budgets then serves as the table of lengths
        at = slice(rows[0], rows[-1] + 1) if whole else rows
        size = total if len(groups) == 1 else int(budgets[at].sum())
        made = _segments([layers[row] for row in rows], scores[at], budgets[at], size, live, rerotate)
        yield from zip(rows, made, strict=True)


def _groups(layers: list[CompressedLayer]) -> list[list[int]]:
    """Which of the layers share a pool."""
    groups: dict[tuple[object, int], list[int]] = {}
    for at, layer in enumerate(layers):
        keys, _ = layer.whole_prompt()
        groups.setdefault((keys.device, keys.shape[-1]), []).append(at)
    return list(groups.values())


def _segments(
    layers: list[CompressedLayer],
    scores: Tensor,
    budgets: Tensor,
    total: int,
    live: CaptureSpec | None,
    rerotate: Rerotate | None,
) -> Iterator[Segment]:
    first_keys, first_values = layers[0].whole_prompt()
    device, dim = first_keys.device, first_keys.shape[-1]
    count, batch, heads, slots = scores.shape
    length = budgets.to(device).reshape(count, batch * heads)
    start = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
    index = select(scores.to(device).reshape(count * batch * heads, slots), length.flatten(), total)
    pool_keys, pool_values = first_keys.new_empty(total, dim), first_values.new_empty(total, dim)
    positions = _positions(layers, index, heads, slots).to(torch.int32)
    followed = live.statistics if live is not None else frozenset()
    statistics = {one: _followed(layers, one, index, slots) for one in followed}
    stood, first, rotated = _rerotated(layers, index, positions, start, length, slots, rerotate)
    for at, layer in enumerate(layers):
        keys, values = (held.reshape(batch * heads, slots, dim) for held in layer.whole_prompt())
        segment = Segment(pool_keys, pool_values, positions, start[at], length[at], slots, statistics, rotated)
        first_row = at * batch * heads
        turned = None if rerotate is None else Rerotation(stood, first[at], layer.rotary_frequencies())
        gather_kv(
            keys, values, index, first_row, start[at], length[at], pool_keys, pool_values, turned, spans=segment.spans
        )
        yield segment


def _followed(layers: list[CompressedLayer], one: Statistic, index: Tensor, slots: int) -> Tensor:
    """What was gathered of the chosen entries, [N, F]; heads may share it."""
    held = torch.stack([layer.capture.statistics[one] for layer in layers])  # [L, B, H or 1, S, F]
    if held.shape[2] != layers[0].heads:
        index = index // slots // layers[0].heads * slots + index % slots
    return held.flatten(0, 3)[index]


def _positions(layers: list[CompressedLayer], index: Tensor, heads: int, slots: int) -> Tensor:
    """Positions of the chosen entries; before anything is evicted they are the same in all layers and heads."""
    if layers[0].positions is not None:
        return torch.stack([layer.entry_positions() for layer in layers]).flatten()[index]
    shared = layers[0].slot_positions()
    return shared[(index // slots) // heads % shared.shape[0], index % slots]


def _rerotated(
    layers: list[CompressedLayer],
    index: Tensor,
    positions: Tensor,
    start: Tensor,
    length: Tensor,
    slots: int,
    rerotate: Rerotate | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positions [N] that the chosen keys are rotated to so far, those [L, R] that the first of every row gets, and
    those [N] that all get; the last is None where nothing is rotated."""
    first = torch.zeros_like(length)
    if rerotate is None:
        return positions, first, None
    stood = positions
    if layers[0].rotated is not None:
        stood = torch.stack([layer.stands() for layer in layers]).flatten()[index].to(torch.int32)
    if rerotate == "end":
        tokens = layers[0].entry_positions().amax((1, 2)) + 1
        first = tokens.repeat_interleave(layers[0].heads) - length
    rank = torch.arange(len(index), device=index.device) - start.flatten()[index // slots]
    return stood, first, (first.flatten()[index // slots] + rank).to(torch.int32)
