"""Eviction: the highest-scored entries of layers move into a pool of exactly their number."""

import torch
from torch import Tensor

from learnkv.layer import CompressedLayer
from learnkv.observation import Recording
from learnkv.ops.gather_kv import gather_kv
from learnkv.ops.select import select
from learnkv.segments import Segment


def compact(layers: list[CompressedLayer], scores: Tensor, budgets: Tensor, total: int, live: Recording | None) -> None:
    """Keep the `budgets[l, b, h]` highest-scored entries of every head of `layers`; one pool per device and head size.

    Nothing waits for a device where all layers share a pool. How much each of several pools holds is looked up.

    Args:
        scores: [L, B, H, S] float32, +inf protected, -inf no entry.
        budgets: [L, B, H] int64.
        total: sum of `budgets`.
        live: what is recorded of tokens to come.
    """
    groups = _groups(layers)
    for rows in groups:
        whole = len(rows) == rows[-1] - rows[0] + 1  # a view of the budgets then serves as the table of lengths
        at = slice(rows[0], rows[-1] + 1) if whole else rows
        size = total if len(groups) == 1 else int(budgets[at].sum())
        _compact([layers[row] for row in rows], scores[at], budgets[at], size, live)


def _groups(layers: list[CompressedLayer]) -> list[list[int]]:
    """Which of the layers share a pool."""
    groups: dict[tuple[object, int], list[int]] = {}
    for at, layer in enumerate(layers):
        keys, _ = layer.whole_prompt()
        groups.setdefault((keys.device, keys.shape[-1]), []).append(at)
    return list(groups.values())


def _compact(
    layers: list[CompressedLayer], scores: Tensor, budgets: Tensor, total: int, live: Recording | None
) -> None:
    first_keys, first_values = layers[0].whole_prompt()
    device, dim = first_keys.device, first_keys.shape[-1]
    count, batch, heads, slots = scores.shape
    length = budgets.to(device).reshape(count, batch * heads)
    start = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
    index = select(scores.to(device).reshape(count * batch * heads, slots), length.flatten(), total)
    pool_keys, pool_values = first_keys.new_empty(total, dim), first_values.new_empty(total, dim)
    positions = _positions(layers, index, heads, slots).to(torch.int32)
    followed = live.statistics if live is not None else frozenset()
    statistics = {
        one: torch.stack([layer.recorder.statistics[one] for layer in layers]).flatten(0, 3)[index] for one in followed
    }
    for at, layer in enumerate(layers):
        keys, values = (held.reshape(batch * heads, slots, dim) for held in layer.whole_prompt())
        segment = Segment(pool_keys, pool_values, positions, start[at], length[at], slots, statistics)
        first_row = at * batch * heads
        gather_kv(keys, values, index, first_row, start[at], length[at], pool_keys, pool_values, spans=segment.spans)
        layer.evict(segment, live)


def _positions(layers: list[CompressedLayer], index: Tensor, heads: int, slots: int) -> Tensor:
    """Positions of the chosen entries; before anything is evicted they are the same in all layers and heads."""
    if layers[0].positions is not None:
        return torch.stack([layer.entry_positions() for layer in layers]).flatten()[index]
    shared = layers[0].slot_positions()
    return shared[(index // slots) // heads % shared.shape[0], index % slots]
