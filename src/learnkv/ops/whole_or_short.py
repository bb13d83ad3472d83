"""Budgets of which some heads or layers keep everything and the others a fixed number of entries."""

import torch
from torch import Tensor


def whole_or_short(need: Tensor, budget: Tensor, entries: Tensor, short: Tensor) -> Tensor:
    """Wanted entries [N, B]: all of them for those of the highest `need` as long as the budget lasts.

    Args:
        need: [N, B]; ties are served in order.
        budget: [B] entries on average over the N.
        entries: [B] that there are.
        short: [B] that the others get, or the budget where this is less.
    """
    order = need.argsort(dim=0, descending=True, stable=True)
    number = torch.arange(len(need), device=need.device).unsqueeze(-1).expand_as(order)
    rank = torch.empty_like(order).scatter_(0, order, number)
    more = (budget - short).clamp_min(0) * len(need) - rank * (entries - short)
    return more.clamp_min(0).minimum(entries - short) + short.minimum(budget)
