"""A weighted sum of objectives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.training.objectives.base import Comparison, Objective


class WeightedSum(Objective):
    """Sum of objectives, each times its weight.

    Args:
        objectives: terms of the sum.
        weights: a positive number for each.
    """

    def __init__(self, objectives: Sequence[Objective], weights: Sequence[float]) -> None:
        super().__init__()
        if not objectives or len(objectives) != len(weights) or min(weights) <= 0:
            raise UserError(
                f"weights={list(weights)}: expected one number above 0 for each of the {len(objectives)} objectives"
            )
        self.objectives = torch.nn.ModuleList(objectives)
        self.weights = tuple(weights)
        self.reads = any(part.reads for part in objectives)
        self.hidden = any(part.hidden for part in objectives)
        self.plans = any(part.plans for part in objectives)
        self.budgets = any(part.budgets for part in objectives)
        self.targets = tuple(target for part in objectives for target in part.targets)

    def forward(self, inputs: Comparison) -> Tensor:
        losses = [weight * part(inputs) for weight, part in zip(self.weights, self.objectives, strict=True)]
        return torch.stack(losses).sum(0)
