"""Counts per head from one ranking over all layers and heads: hard forward, soft backward."""

import torch
from torch import Tensor

from learnkv.ops.soft_topk import soft_topk

_TIE = 1e-6  # in units of normal scores: smaller differences count as ties


def margins(scores: Tensor, baseline: Tensor, counts: Tensor) -> Tensor:
    """Scores minus the level at which each head's budget ended before training; infinite scores are unchanged.

    A head's level is half-way between the baseline scores of its last kept entry and the next one. While `scores`
    equal `baseline`, one ranking of the result gives every head its count exactly, ties included.

    Args:
        scores: [L, B, H, S]; +inf protected, -inf no entry.
        baseline: [L, B, H, S] the scores before training, in the same units.
        counts: [L, B, H] integer, entries that each head kept then, protected ones included.
    """
    ordered, order = baseline.sort(dim=-1, descending=True, stable=True)
    last, following = counts - 1, counts
    slots = baseline.shape[-1]
    above = ordered.gather(-1, last.clamp(0, slots - 1).unsqueeze(-1))
    below = ordered.gather(-1, following.clamp(0, slots - 1).unsqueeze(-1))
    # A head that kept no unprotected entry, or everything: a unit from its nearest entry.
    above = torch.where(above.isfinite() & (counts > 0).unsqueeze(-1), above, below + 2)
    below = torch.where(below.isfinite() & (counts < slots).unsqueeze(-1), below, above - 2)
    level = ((above + below) / 2).nan_to_num(0.0, 0.0, 0.0)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(slots, device=order.device).expand_as(order))
    side = torch.where(rank < counts.unsqueeze(-1), level.new_full((), _TIE), -_TIE)
    return torch.where(scores.isfinite(), scores - level + side, scores)


def ranked_counts(scores: Tensor, total: Tensor, temperature: float = 0.5) -> Tensor:
    """Number of the `total` best entries of a row that belong to each head, [L, B, H] float64; -inf never counts.

    The gradient is that of the head's sum in a soft top-k over the whole row. A soft top-k within each head with these
    counts then has, in sum, the gradient of the one over the whole row.

    Args:
        scores: [L, B, H, S].
        total: [B] integer.
        temperature: width of the soft top-k in units of the scores.
    """
    layers, batch, heads, slots = scores.shape
    flat = scores.transpose(0, 1).flatten(1)  # [B, L*H*S]
    order = flat.argsort(dim=-1, descending=True, stable=True)
    within = torch.arange(flat.shape[-1], device=flat.device) < total.unsqueeze(-1)
    best = torch.zeros_like(within).scatter_(-1, order, within) & (flat > -torch.inf)
    counts = best.view(batch, layers, heads, slots).sum(-1).transpose(0, 1).double()
    if not scores.requires_grad:
        return counts
    soft = soft_topk(flat.double(), total.double(), temperature).view(batch, layers, heads, slots)
    soft = soft.sum(-1).transpose(0, 1)
    return counts + (soft - soft.detach())
