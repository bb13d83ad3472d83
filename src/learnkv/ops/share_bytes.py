"""A budget of bytes shared out over entries and their levels: hard forward, soft backward."""

import torch
from torch import Tensor

from learnkv.ops.soft_topk import soft_topk

TEMPERATURE = 0.5


def share_bytes(values: Tensor, cost: Tensor, budget: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """How many entries of every head get each level or a higher one, [M, L, B, H] float64.

    The steps of all entries, from one level to the next, are taken by falling value until the next one exceeds the
    budget: never more is spent, and less than the bytes of one step is left. A step without bytes that is worth as much
    as the one before is taken with it. The gradient is that of the sums over each
    head in one soft selection with the same budget, which reaches the values of all steps.

    Args:
        values: [M, L, B, H, S] of the step to each level, falling or equal from level to level; +inf: taken in any
            case, -inf: never.
        cost: [M, L, H] bytes of each step, integers.
        budget: [B] bytes of each row, or [L, B, H] of each head.
        temperature: width of the soft selection in units of the values.

    Returns:
        Counts that do not rise from level to level.
    """
    of_heads = budget.dim() == 3
    # Rows share a budget; the steps of an entry lie side by side, so that equal values are taken in order.
    steps = values.permute(1, 2, 3, 4, 0) if of_heads else values.permute(2, 1, 3, 4, 0)
    shape = steps.shape
    by_head = cost.permute(1, 2, 0).to(values.device, torch.float64).unsqueeze(-2)  # [L, H, 1, M]
    costs = by_head.unsqueeze(1) if of_heads else by_head.unsqueeze(0)
    rows, costs = steps.flatten(3 if of_heads else 1), costs.expand(shape).flatten(3 if of_heads else 1)
    spend = budget.to(values.device, torch.float64)
    taken = _sums(_prefix(rows.detach(), costs, spend), shape, of_heads)
    if not values.requires_grad:
        return taken
    soft = _sums(soft_topk(rows.double(), spend, temperature, costs), shape, of_heads)
    return taken + (soft - soft.detach())


def _prefix(values: Tensor, costs: Tensor, budget: Tensor) -> Tensor:
    """Mask of the most valuable steps [..., K] within a budget [...]."""
    order = values.argsort(dim=-1, descending=True, stable=True)
    within = costs.gather(-1, order).cumsum(-1) <= budget.unsqueeze(-1)
    mask = torch.zeros_like(within).scatter_(-1, order, within)
    return mask & (values > -torch.inf)


def _sums(mask: Tensor, shape: torch.Size, of_heads: bool) -> Tensor:
    """Sums [M, L, B, H] over the entries of every head."""
    sums = mask.view(shape).sum(-2).double()
    return sums.permute(3, 0, 1, 2) if of_heads else sums.permute(3, 1, 0, 2)
