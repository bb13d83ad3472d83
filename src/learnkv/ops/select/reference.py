"""Top-k of ragged rows by a stable sort."""

import torch
from torch import Tensor


def select(scores: Tensor, budget: Tensor, total: int) -> Tensor:
    """`select` in PyTorch."""
    return torch.nonzero_static(_kept(scores, budget).flatten(), size=total).squeeze(-1)


def select_slots(scores: Tensor, budget: Tensor, most: int) -> Tensor:
    """`select_slots` in PyTorch."""
    slots = scores.shape[-1]
    kept = _kept(scores, budget) & (scores != float("-inf"))
    slot = torch.where(kept, torch.arange(slots, device=scores.device), slots).sort(-1).values[:, :most]
    chosen = torch.full((scores.shape[0], most), -1, dtype=torch.int32, device=scores.device)
    chosen[:, : slot.shape[1]] = slot.masked_fill(slot == slots, -1)
    return chosen


def _kept(scores: Tensor, budget: Tensor) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    within = torch.arange(scores.shape[-1], device=scores.device) < budget.unsqueeze(-1)
    return torch.zeros_like(within).scatter_(-1, order, within)
