"""Counts per head from one ranking over all layers and heads: hard forward, soft backward."""

import torch
from torch import Tensor

from learnkv.ops.soft_topk import soft_topk

_TIE = 1e-6  # below it, units of normal scores are not told apart


def margins(scores: Tensor, prior: Tensor, held: Tensor) -> Tensor:
    """Scores measured from where each head's budget ended before anything was learned; finite ones only are moved.

    A head's level is the prior half-way between the last entry that it held and the next one. While `scores` still are
    `prior`, one ranking of the result gives every head what it held, exactly, ties included.

    Args:
        scores: [L, B, H, S]; +inf protected, -inf no entry.
        prior: [L, B, H, S] the same before anything was learned, in the same units.
        held: [L, B, H] integer, entries that each head held then, protected ones included.
    """
    ordered, order = prior.sort(dim=-1, descending=True, stable=True)
    last, following = held - 1, held
    slots = prior.shape[-1]
    above = ordered.gather(-1, last.clamp(0, slots - 1).unsqueeze(-1))
    below = ordered.gather(-1, following.clamp(0, slots - 1).unsqueeze(-1))
    # A head that held nothing in question, or everything: a unit from its nearest entry.
    above = torch.where(above.isfinite() & (held > 0).unsqueeze(-1), above, below + 2)
    below = torch.where(below.isfinite() & (held < slots).unsqueeze(-1), below, above - 2)
    level = ((above + below) / 2).nan_to_num(0.0, 0.0, 0.0)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(slots, device=order.device).expand_as(order))
    side = torch.where(rank < held.unsqueeze(-1), _TIE, -_TIE)
    return torch.where(scores.isfinite(), scores - level + side, scores)


def ranked_counts(scores: Tensor, total: Tensor, temperature: float = 0.5) -> Tensor:
    """How many of the `total` best entries of a row each head has, [L, B, H] float64; +inf first, -inf never.

    The gradient is that of the head's sum in a soft top-k over the whole row. A soft top-k within each head that gets
    these counts then has, in sum, the gradient of the one over the whole row: within heads an entry is compared with
    its head, here the head with all others.

    Args:
        scores: [L, B, H, S].
        total: [B] integer.
        temperature: width of the soft top-k in units of the scores.
    """
    layers, batch, heads, slots = scores.shape
    flat = scores.transpose(0, 1).flatten(1)  # [B, L*H*S]
    order = flat.argsort(dim=-1, descending=True, stable=True)
    among = torch.arange(flat.shape[-1], device=flat.device) < total.unsqueeze(-1)
    best = torch.zeros_like(among).scatter_(-1, order, among) & (flat > -torch.inf)
    counts = best.view(batch, layers, heads, slots).sum(-1).transpose(0, 1).double()
    if not scores.requires_grad:
        return counts
    soft = soft_topk(flat.double(), total.double(), temperature).view(batch, layers, heads, slots)
    soft = soft.sum(-1).transpose(0, 1)
    return counts + (soft - soft.detach())
