"""Whole numbers of entries per head that spend a budget exactly."""

import torch
from torch import Tensor

_SMALLEST = 1e-9  # of the mean ratio: heads that want nothing get only what all others cannot take
_DECIMALS = 9


def round_to_budget(wanted: Tensor, entries: Tensor, total: Tensor, protected: Tensor) -> Tensor:
    """Round wanted budgets to integers that sum to `total` exactly, with no host sync.

    The wanted budgets of a row are scaled by one factor such that, clamped to [protected, entries], they sum to
    `total`; fractions are rounded by largest remainder, ties by (layer, head). A plain clamp without the factor would
    leave part of the budget unspent wherever a head wants more entries than the prompt has.

    Args:
        wanted: [L, B, H] wanted entries per head, non-negative; proportions matter, not the scale.
        entries: [B] integer, entries that every head of the row has.
        total: [B] integer, entries to spend in the row, within [L*H*protected, L*H*entries].
        protected: [B] integer, protected entries of every head of the row.

    Returns:
        [L, B, H] int64.
    """
    layers, batch, heads = wanted.shape
    ratios = wanted.detach().to(torch.float64).transpose(0, 1).reshape(batch, layers * heads)
    ratios = ratios.clamp_min(0)
    ratios = ratios / ratios.mean(-1, keepdim=True).clamp_min(torch.finfo(ratios.dtype).tiny) + _SMALLEST
    low = protected.to(torch.float64).view(batch, 1)
    high = entries.to(torch.float64).view(batch, 1)
    amount = (ratios * _factor(ratios, low, high, total.to(torch.float64).view(batch, 1))).clamp(low, high)
    amount = torch.round(amount, decimals=_DECIMALS)
    whole = amount.floor()
    remainder = torch.where(whole < high, amount - whole, -torch.ones_like(amount))
    missing = total.view(batch, 1) - whole.sum(-1, keepdim=True).to(torch.int64)
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    slots = whole.to(torch.int64) + (rank < missing)
    return slots.view(batch, layers, heads).transpose(0, 1).contiguous()


def round_layer(
    wanted: Tensor, before: Tensor, left: Tensor, layers_left: int, entries: Tensor, protected: Tensor
) -> Tensor:
    """Integers of one layer, from its own wanted budgets and those of earlier layers alone.

    The wanted budgets of all layers so far are summed and rounded, and the layer gets the increase. So whole numbers
    stay as they are, and wanted budgets that sum to the total spend it. The result is clamped such that later layers
    can take the rest and keep their protected entries.

    Args:
        wanted: [B, H] wanted entries per head; unlike in `round_to_budget`, their sum matters.
        before: [B] float64, sum of the wanted budgets of earlier layers.
        left: [B] integer, entries that earlier layers did not get.
        layers_left: number of layers to come.
        entries, protected: as in `round_to_budget`.

    Returns:
        [B, H] int64; in the last layer they sum to `left`.
    """
    heads = wanted.shape[1]
    before = before.to(torch.float64)
    after = before + wanted.detach().to(torch.float64).sum(-1)
    amount = _nearest(after) - _nearest(before)
    least, most = heads * protected, heads * entries
    total = amount.clamp(
        torch.maximum(least, left - layers_left * most), torch.minimum(most, left - layers_left * least)
    )
    return round_to_budget(wanted.unsqueeze(0), entries, total, protected)[0]


def round_in_order(wanted: Tensor, entries: Tensor, total: Tensor, protected: Tensor) -> Tensor:
    """`round_layer` for one layer after the other: [L, B, H] int64, which sum to `total` [B] in every row."""
    left, budgets, layers = total, [], len(wanted)
    for layer_idx, of_layer in enumerate(wanted):
        before = wanted[:layer_idx].detach().to(torch.float64).sum((0, 2))
        budgets.append(round_layer(of_layer, before, left, layers - 1 - layer_idx, entries, protected))
        left = left - budgets[-1].sum(-1)
    return torch.stack(budgets)


def _nearest(number: Tensor) -> Tensor:
    """Nearest integer, halves upwards, so that x + n rounds to round(x) + n for whole n."""
    return torch.floor(torch.round(number, decimals=_DECIMALS) + 0.5).to(torch.int64)


def _factor(ratios: Tensor, low: Tensor, high: Tensor, total: Tensor) -> Tensor:
    """The factor [B, 1] at which the clamped wanted budgets [B, N] sum to `total`.

    The sum is piecewise linear in the factor. Bisection over the corners finds the piece, which is solved with sums of
    its own heads: running sums over all corners would lose small numbers beside large ones.
    """
    rises, stops = low / ratios, high / ratios
    corner = torch.cat([rises, stops], -1).sort(dim=-1).values
    below = torch.zeros_like(total, dtype=torch.int64)
    above = torch.full_like(below, corner.shape[-1])
    for _ in range(corner.shape[-1].bit_length()):
        middle = (below + above) // 2
        too_little = (ratios * corner.gather(-1, middle)).clamp(low, high).sum(-1, keepdim=True) <= total
        below, above = torch.where(too_little, middle, below), torch.where(too_little, above, middle)
    corner_below = corner.gather(-1, below)
    waiting, full = rises > corner_below, stops <= corner_below
    rest = total - low * waiting.sum(-1, keepdim=True) - high * full.sum(-1, keepdim=True)
    climb = ratios.masked_fill(waiting | full, 0).sum(-1, keepdim=True)
    return torch.where(climb > 0, rest / climb.clamp_min(1e-300), corner_below)
