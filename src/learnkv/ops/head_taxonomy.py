"""HeteroCache's kinds of heads: how stable a head's attention is, and which heads attend to the same entries."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ANCHOR, VOLATILE, PIVOT, SATELLITE = 1, 2, 3, 4


@dataclass(frozen=True)
class Taxonomy:
    """Kinds of kv heads, their weights, and the pivot of every satellite."""

    kinds: Tensor
    """[L, H] int64: 1 anchor, 2 volatile, 3 pivot, 4 satellite."""
    weights: Tensor
    """[L, H] float64, of anchors and satellites, 1 on average; -1 for the others."""
    pivots: Tensor
    """[L, H] int64 head that a satellite follows; -1 for the others."""
    order: Sequence[Sequence[int]]
    """Pivots of every layer in the order in which they were chosen."""

    @property
    def full(self) -> Tensor:
        """[L, H] True for heads that keep everything: pivots and volatile ones."""
        return (self.kinds == VOLATILE) | (self.kinds == PIVOT)


def top_sets(attention: Tensor, count: int) -> Tensor:
    """Masks [B, H, P] of the `count` best of P entries by attention [B, H, G, P], the mean of a group and 5 entries."""
    pooled = F.avg_pool1d(attention.float().mean(2), 5, 1, 2)
    return torch.zeros_like(pooled).scatter(-1, pooled.topk(min(count, pooled.shape[-1])).indices, 1.0).bool()


def taxonomy(steps: Sequence[Sequence[Tensor]], stable: float = 0.5, similar: float = 0.5) -> Taxonomy:
    """The kinds of all heads.

    Args:
        steps: for every layer the `top_sets` [B, H, P] of the prompt's last query, then of queries while decoding.
        stable: median overlap with the prompt's set below which a head is volatile.
        similar: overlap of two heads' last sets from which they may share one.
    """
    layers = [_layer(sets, stable, similar) for sets in steps]
    kinds, overlaps, pivots, orders = zip(*layers, strict=True)
    kind, overlap = torch.tensor(kinds), torch.tensor(overlaps, dtype=torch.float64)
    shared = (kind == ANCHOR) | (kind == SATELLITE)
    inverse = 1 / (overlap + 1e-6)
    weights = torch.where(shared, inverse / inverse[shared].mean(), -1.0)
    return Taxonomy(kind, weights, torch.tensor(pivots), orders)


def _layer(
    sets: Sequence[Tensor], stable: float, similar: float
) -> tuple[list[int], list[float], list[int], list[int]]:
    """Kinds, stability, pivots of the heads, and the pivots in order."""
    history = [_overlap(sets[0], later).tolist() for later in sets[1:]]
    stability = [statistics.median(of_head) for of_head in zip(*history, strict=True)]
    heads = range(len(stability))
    last = sets[-1]
    alike = _overlap(last.unsqueeze(2), last.unsqueeze(1)) >= similar
    near = [{other for other in heads if other != head and bool(alike[head, other])} for head in heads]
    kinds = [VOLATILE if median < stable else ANCHOR for median in stability]
    pivots, order, free = [-1] * len(kinds), list[int](), set(heads)
    while free:
        pivot = min(free, key=lambda head: (-len(near[head] & free), head))
        satellites = near[pivot] & free
        if not satellites:
            break
        order.append(pivot)
        kinds[pivot] = PIVOT
        for head in satellites:
            kinds[head], pivots[head] = SATELLITE, pivot
        free -= satellites | {pivot}
    return kinds, stability, pivots, order


def _overlap(first: Tensor, second: Tensor) -> Tensor:
    """Part of the entries of `first` [B, …, P] that `second` has, averaged over B in float64."""
    shares = (first & second).sum(-1).double() / first.sum(-1).double()
    return shares.sum(0) / len(shares)


def base_entries(weights: Tensor, entries: Tensor, keep: Tensor, whole_numbers: bool) -> Tensor:
    """Entries [B] of a head of weight 1, at least 0.

    Args:
        weights: [L, H], -1 for heads that keep all their `entries` [B].
        keep: [B] float64 fraction of all entries.
    """
    count, full = weights.numel(), (weights < 0).sum()  # on the device, which nothing waits for
    base = (keep * count - full) * entries / (count - full).clamp_min(1)
    base = base.masked_fill(full == count, 0.0)
    return (base.trunc() if whole_numbers else base).clamp_min(0)
