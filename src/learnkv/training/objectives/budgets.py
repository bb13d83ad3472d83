"""Regression of a policy's budgets on those of one top-k over all heads."""

import torch
from torch import Tensor

from learnkv.allocators.flat import Flat
from learnkv.core.scorer import Scorer
from learnkv.training.objectives.base import Comparison, Objective


class BudgetRegression(Objective):
    """KL from the split of the budget by `target`'s scores to the policy's split, over the heads of all layers.

    A head's target share is its part of the top-k over all heads (`Flat`, KVzip's own allocation); its share in the
    policy is the allocator's.

    Args:
        target: scorer of the target shares; it is not trained. Its scores must be comparable between layers.
    """

    name = "budget_kl"
    reads = False
    plans = True

    def __init__(self, target: Scorer) -> None:
        super().__init__()
        self.target = target.requires_grad_(False)
        self.targets = (target,)

    def forward(self, inputs: Comparison) -> Tensor:
        assert inputs.plan is not None
        scores, wanted = inputs.plan.scores.detach(), inputs.plan.wanted.double()
        target_scores = torch.where(scores.isfinite(), inputs.targets[self.target].float(), scores)
        per_head = inputs.plan.budgets.double().mean((0, 2))
        target = Flat()(target_scores, None, per_head)
        target = target / target.sum((0, 2), keepdim=True)
        share = wanted / wanted.sum((0, 2), keepdim=True)
        divergence: Tensor = torch.special.xlogy(target, target / share.clamp_min(1e-12)).sum((0, 2))
        return divergence.float()
