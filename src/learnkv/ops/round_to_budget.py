"""Whole numbers of entries per head that spend a budget exactly."""

import torch
from torch import Tensor

_SMALLEST_WISH = 1e-9  # of the mean wish: who wishes nothing gets what nobody else can hold
_DECIMALS = 9


def round_to_budget(wanted: Tensor, entries: Tensor, total: Tensor, protected: Tensor) -> Tensor:
    """Turn wished budgets into integers that sum to `total` exactly, with no host sync.

    The wishes of a row are scaled by one factor until, clamped to [protected, entries], they sum to `total`; the
    fractions are settled by largest remainder, ties by (layer, head). A plain clamp without the factor would leave
    part of the budget unspent wherever a head wants more entries than the prompt has.

    Args:
        wanted: [L, B, H] wished entries per head, non-negative; proportions matter, not the scale.
        entries: [B] integer, entries that every head of the row has.
        total: [B] integer, entries to spend in the row, within [L*H*protected, L*H*entries].
        protected: [B] integer, entries that every head of the row keeps in any case.

    Returns:
        [L, B, H] int64.
    """
    layers, batch, heads = wanted.shape
    wish = wanted.detach().to(torch.float64).transpose(0, 1).reshape(batch, layers * heads)
    wish = wish.clamp_min(0)
    wish = wish / wish.mean(-1, keepdim=True).clamp_min(torch.finfo(wish.dtype).tiny) + _SMALLEST_WISH
    low = protected.to(torch.float64).view(batch, 1)
    high = entries.to(torch.float64).view(batch, 1)
    share = (wish * _factor(wish, low, high, total.to(torch.float64).view(batch, 1))).clamp(low, high)
    share = torch.round(share, decimals=_DECIMALS)
    whole = share.floor()
    remainder = torch.where(whole < high, share - whole, -torch.ones_like(share))
    missing = total.view(batch, 1) - whole.sum(-1, keepdim=True).to(torch.int64)
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    slots = whole.to(torch.int64) + (rank < missing)
    return slots.view(batch, layers, heads).transpose(0, 1).contiguous()


def round_layer(wanted: Tensor, before: Tensor, left: Tensor, later: int, entries: Tensor, protected: Tensor) -> Tensor:
    """Integers of one layer, before those to come are known: they depend on it and on what earlier layers asked for.

    The wishes of all layers up to now are summed and rounded, and the layer gets what that has grown by. So layers that
    wish for whole numbers get them, and wishes that sum to the budget spend it. Whatever a layer wishes, it gets as
    much as later ones cannot hold, and leaves them what they keep in any case.

    Args:
        wanted: [B, H] wished entries per head; other than in `fit`, their sum matters.
        before: [B] float64, what earlier layers wished for in all.
        left: [B] integer, entries that earlier layers did not get.
        later: number of layers to come.
        entries, protected: as for `fit`.

    Returns:
        [B, H] int64; once no layer is to come, they sum to `left`.
    """
    heads = wanted.shape[1]
    before = before.to(torch.float64)
    after = before + wanted.detach().to(torch.float64).sum(-1)
    share = _nearest(after) - _nearest(before)
    least, most = heads * protected, heads * entries
    total = share.clamp(torch.maximum(least, left - later * most), torch.minimum(most, left - later * least))
    return round_to_budget(wanted.unsqueeze(0), entries, total, protected)[0]


def round_in_order(wanted: Tensor, entries: Tensor, total: Tensor, protected: Tensor) -> Tensor:
    """`fit_layer` for one layer after the other: [L, B, H] int64, which sum to `total` [B] in every row."""
    left, budgets, layers = total, [], len(wanted)
    for at, own in enumerate(wanted):
        before = wanted[:at].detach().to(torch.float64).sum((0, 2))
        budgets.append(round_layer(own, before, left, layers - 1 - at, entries, protected))
        left = left - budgets[-1].sum(-1)
    return torch.stack(budgets)


def _nearest(number: Tensor) -> Tensor:
    """Nearest integer, halves upwards, so that a whole number more gives a whole number more."""
    return torch.floor(torch.round(number, decimals=_DECIMALS) + 0.5).to(torch.int64)


def _factor(wish: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """The factor [B, 1] at which the clamped wishes [B, N] sum to `total`.

    The sum is piecewise linear in the factor. The piece is found by bisection over its corners and solved with sums of
    its own heads: running sums over all corners would lose small wishes beside large ones.
    """
    rises, stops = low / wish, high / wish
    corner = torch.cat([rises, stops], -1).sort(dim=-1).values
    below = torch.zeros_like(total, dtype=torch.int64)
    above = torch.full_like(below, corner.shape[-1])
    for _ in range(corner.shape[-1].bit_length()):
        middle = (below + above) // 2
        too_little = (wish * corner.gather(-1, middle)).clamp(low, high).sum(-1, keepdim=True) <= total
        below, above = torch.where(too_little, middle, below), torch.where(too_little, above, middle)
    at = corner.gather(-1, below)
    waiting, full = rises > at, stops <= at
    rest = total - low * waiting.sum(-1, keepdim=True) - high * full.sum(-1, keepdim=True)
    climb = wish.masked_fill(waiting | full, 0).sum(-1, keepdim=True)
    return torch.where(climb > 0, rest / climb.clamp_min(1e-300), at)
