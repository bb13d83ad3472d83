"""Several objectives at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.training.objectives.base import Comparison, Objective


class WeightedSum(Objective):
    """Sum of objectives, each times its weight.

    Args:
        objectives: what is added.
        weights: one positive number for each.
    """

    def __init__(self, objectives: Sequence[Objective], weights: Sequence[float]) -> None:
        super().__init__()
        if not objectives or len(objectives) != len(weights) or min(weights) <= 0:
            raise UserError(
                f"weights={list(weights)}: expected one number above 0 for each of the {len(objectives)} objectives"
            )
        self.objectives = torch.nn.ModuleList(objectives)
        self.weights = tuple(weights)
        self.reads = any(one.reads for one in objectives)
        self.hidden = any(one.hidden for one in objectives)
        self.plans = any(one.plans for one in objectives)
        self.budgets = any(one.budgets for one in objectives)
        self.targets = tuple(target for one in objectives for target in one.targets)

    def forward(self, seen: Comparison) -> Tensor:
        parts = [weight * one(seen) for weight, one in zip(self.weights, self.objectives, strict=True)]
        return torch.stack(parts).sum(0)
