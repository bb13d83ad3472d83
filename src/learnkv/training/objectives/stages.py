"""One objective after another."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.training.objectives.base import Comparison, Objective


class Stages(Objective):
    """Each objective for some steps, the last one until the end: what is cheap first, what counts last.

    Regression on a slower scorer reads no continuation and says something of every entry, so that distillation starts
    from scores that are right in most places.

    Args:
        objectives: in their order.
        steps: how many optimiser steps each of them lasts; none for the last one.
    """

    def __init__(self, objectives: Sequence[Objective], steps: Sequence[int]) -> None:
        super().__init__()
        if not objectives or len(steps) != len(objectives) - 1 or any(one < 1 for one in steps):
            raise UserError(
                f"steps={list(steps)}: expected a number above 0 for each of {len(objectives)} objectives but the last"
            )
        self.objectives = torch.nn.ModuleList(objectives)
        self.steps = tuple(steps)
        self.name = objectives[-1].name

    def at(self, step: int) -> Objective:
        stage = sum(step >= sum(self.steps[: end + 1]) for end in range(len(self.steps)))
        found = self.objectives[stage]
        assert isinstance(found, Objective)
        return found.at(step)

    def forward(self, seen: Comparison) -> Tensor:
        raise AssertionError("a stage is asked, never all of them")
