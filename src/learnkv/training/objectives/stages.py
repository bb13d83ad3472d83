"""A schedule of objectives."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.training.objectives.base import Comparison, Objective


class Stages(Objective):
    """Each objective for a number of steps, the last one until the end.

    A warm start: regression on the scores of a slower scorer needs no continuation and has a target for every entry;
    distillation follows.

    Args:
        objectives: in their order.
        steps: optimiser steps of each objective but the last.
    """

    def __init__(self, objectives: Sequence[Objective], steps: Sequence[int]) -> None:
        super().__init__()
        if not objectives or len(steps) != len(objectives) - 1 or any(count < 1 for count in steps):
            raise UserError(
                f"steps={list(steps)}: expected a number above 0 for each of {len(objectives)} objectives but the last"
            )
        self.objectives = torch.nn.ModuleList(objectives)
        self.steps = tuple(steps)
        self.name = objectives[-1].name

    def at_step(self, step: int) -> Objective:
        index = sum(step >= sum(self.steps[: end + 1]) for end in range(len(self.steps)))
        stage = self.objectives[index]
        assert isinstance(stage, Objective)
        return stage.at_step(step)

    def forward(self, inputs: Comparison) -> Tensor:
        raise AssertionError("call the objective of a step")
