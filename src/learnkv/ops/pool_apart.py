"""Pooling over neighbouring cache entries."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Pooling = Literal["avg", "max"]


def pool_apart(scores: Tensor, inside: Tensor, valid: Tensor, kernel_size: int, pooling: Pooling) -> Tensor:
    """Pool entries before the window, and those of the window, separately.

    Slots beyond their ends, and slots that are not valid, count as zeros in a mean, which is over `kernel_size` slots
    everywhere, and as -inf in a maximum.

    Args:
        scores: [..., S] slots in position order.
        inside: [..., S] bool, which entries belong to the window; broadcast.
        valid: [..., S] bool, False where there is no entry (the result is 0 there); broadcast.
        kernel_size: slots that are pooled, odd.
        pooling: mean or maximum over the slots.
    """
    past = _pool(scores, valid & ~inside, kernel_size, pooling)
    window = _pool(scores, valid & inside, kernel_size, pooling)
    return torch.where(inside, window, past).masked_fill(~valid, 0.0)


def _pool(scores: Tensor, among: Tensor, kernel_size: int, pooling: Pooling) -> Tensor:
    """Pool over neighbouring slots, of which only those `among` count."""
    rows, slots = scores.flatten(0, -2), scores.shape[-1]
    among = among.expand_as(scores).reshape(-1, slots)
    padding = kernel_size // 2
    if pooling == "max":
        pooled = F.max_pool1d(rows.masked_fill(~among, -torch.inf), kernel_size, stride=1, padding=padding)
    else:
        pooled = F.avg_pool1d(rows.masked_fill(~among, 0.0), kernel_size, stride=1, padding=padding)
    return pooled.view_as(scores)
