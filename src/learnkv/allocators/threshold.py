"""Budgets by how many scores reach a level."""

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator


class Threshold(Allocator):
    """A head requests the entries whose scores reach a level, as policies without a budget do.

    TrimKV's threshold (arXiv 2605.09649) keeps what has faded to 0.6 of itself at most, `level: -0.51` for its
    logarithms, and however many that are. Here these numbers set the proportions between heads; the budget is exact.

    Args:
        level: lowest score that counts.
    """

    status = "numbers"

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        wanted = (scores.detach() >= self.level).sum(-1).double()
        nothing = wanted.sum((0, 2), keepdim=True) == 0
        return torch.where(nothing, 1.0, wanted)
