"""The same budget for every head."""

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator


class Uniform(Allocator):
    """Every kv head of every layer keeps the same number of entries, as in SnapKV (arXiv 2404.14469)."""

    static = True

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, _ = scores.shape
        return budget.to(torch.float64).view(1, batch, 1).expand(layers, batch, heads)
