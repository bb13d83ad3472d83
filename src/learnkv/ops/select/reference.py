"""Top-k of ragged rows by a stable sort."""

import torch
from torch import Tensor


def select(scores: Tensor, budget: Tensor, total: int) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    within = torch.arange(scores.shape[-1], device=scores.device) < budget.unsqueeze(-1)
    kept = torch.zeros_like(within).scatter_(-1, order, within)
    return torch.nonzero_static(kept.flatten(), size=total).squeeze(-1)
