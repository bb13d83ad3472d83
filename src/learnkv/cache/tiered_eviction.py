"""Eviction where kept entries are stored at several levels of precision."""

from collections.abc import Iterator

import torch
from torch import Tensor

from learnkv.cache.eviction import Rerotate, segments_of
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.storage import Segment
from learnkv.cache.tiers import StoredTier
from learnkv.core.observation import CaptureSpec
from learnkv.core.precision import Level, LevelPlan
from learnkv.ops.select import select


def compact_levels(
    layers: list[CompressedLayer],
    scores: Tensor,
    plan: LevelPlan,
    decode_capture: CaptureSpec | None,
    rerotate: Rerotate | None,
    nothing: dict[torch.device, Tensor],
) -> Iterator[tuple[int, Segment, tuple[StoredTier, ...]]]:
    """Number of each layer, the segment of its entries that stay as they are, and the tiers of the others.

    The best kept entries of a head get the highest level. Layers are computed one by one, so that a layer's prompt can
    be freed before the next; the number of entries at each level of each layer is read from the device, once.

    Args:
        scores: [L, B, H, S] float32, +inf protected, -inf no entry.
        plan: of these layers.
        decode_capture, rerotate: as of `compact`.
        nothing: tables of layers whose entries are all in tiers, for the next layers.
    """
    sizes = plan.counts.sum((2, 3)).tolist()
    for layer_idx, layer in enumerate(layers):
        device, rows = layer.device, scores[layer_idx].flatten(0, 1).to(layer.device)
        counts = plan.counts[:, layer_idx].to(device)
        if plan.order is not None:
            kept = torch.zeros(rows.numel(), dtype=torch.bool, device=device)
            kept[select(rows, counts.sum(0).flatten(), sum(of_level[layer_idx] for of_level in sizes))] = True
            rows = plan.order[layer_idx].flatten(0, 1).to(device).masked_fill(~kept.view(rows.shape), -torch.inf)
        segment, tiers = None, list[StoredTier]()
        indices = _level_indices(rows, counts.flatten(1), [of_level[layer_idx] for of_level in sizes])
        for level, used, count, size, index in zip(plan.levels, plan.used, counts, sizes, indices, strict=True):
            if not used:
                continue
            own = scores[layer_idx : layer_idx + 1]
            (part,) = segments_of([layer], own, count[None], size[layer_idx], decode_capture, rerotate, index)
            if level.unchanged(layer.prompt.keys.element_size()):
                segment = part
            else:
                tiers.append(_stored(level, part, layer, index))
        if segment is None:
            zeros = nothing.setdefault(device, torch.zeros(len(rows), dtype=torch.int64, device=device))
            segment = Segment.empty(layer.prompt.keys, zeros)
        yield layer_idx, segment, tuple(tiers)


def _stored(level: Level, segment: Segment, layer: CompressedLayer, index: Tensor) -> StoredTier:
    """The entries `index` [N] of a layer's prompt, which are those of the segment, at a level."""
    carried = layer.prompt.carried
    if carried is not None:
        carried = carried._replace(places=carried.places.flatten()[index])
    obs = layer.observation()
    queries = obs.queries.masked_fill((obs.query_positions < 0)[:, None, :, None], 0.0)  # of padding
    return StoredTier.store(level, segment, layer.layer_idx, layer.heads, queries, carried)


def _level_indices(scores: Tensor, counts: Tensor, sizes: list[int]) -> list[Tensor]:
    """Flat indices of the entries at every level, rows in order, slots ascending within a row.

    Args:
        scores: [R, S].
        counts: [M, R] entries of each level, the best entries at the last.
        sizes: their sums.
    """
    taken = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    so_far, total, indices = torch.zeros_like(counts[0]), 0, list[Tensor]()
    for count, size in zip(reversed(counts), reversed(sizes), strict=True):
        so_far, total = so_far + count, total + size
        best = select(scores, so_far, total)
        indices.append(best if total == size else best[~taken[best]])  # of one level nothing waits for the device
        taken[best] = True
    return indices[::-1]
