"""Regression of a policy's budgets on those that one ranking of the whole model gives."""

import torch
from torch import Tensor

from learnkv.allocators.flat import Flat
from learnkv.core.scorer import Scorer
from learnkv.training.objectives.base import Comparison, Objective


class BudgetRegression(Objective):
    """KL between two splits of the budget over the heads: that of `target`'s scores, all ranked together, and ours.

    A head's share of the first is how many of its entries are among the best of the model (`Flat`, KVzip's own
    allocation), a head's share of the second what the allocator wants for it.

    Args:
        target: gives the scores; it is not trained. They must be comparable between layers.
    """

    name = "budget_kl"
    reads = False
    plans = True

    def __init__(self, target: Scorer) -> None:
        super().__init__()
        self.target = target.requires_grad_(False)
        self.targets = (target,)

    def forward(self, seen: Comparison) -> Tensor:
        assert seen.plan is not None
        scores, wanted = seen.plan.scores.detach(), seen.plan.wanted.double()
        ranked = torch.where(scores.isfinite(), seen.targets[self.target].float(), scores)
        per_head = seen.plan.budgets.double().mean((0, 2))
        share = Flat()(ranked, None, per_head)
        share = share / share.sum((0, 2), keepdim=True)
        ours = wanted / wanted.sum((0, 2), keepdim=True)
        return torch.special.xlogy(share, share / ours.clamp_min(1e-12)).sum((0, 2)).float()
