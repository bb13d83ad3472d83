"""Layer budgets by how evenly the scores of a layer are spread."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator, protected_of


class LAVa(Allocator):
    """Layer budgets in proportion to the entropy of a layer's scores (LAVa, arXiv 2509.09754).

    The scores of all heads of a layer, divided by their sum, have an entropy; over its maximum, the logarithm of their
    number, it is the layer's weight. Scores must be non-negative. LAVa then splits each layer as AdaKV does, with a
    floor of 0.2 of the average layer: `AdaKV(LAVa(), floor=0.2, floor_of="average")`. Its code takes that floor of the
    whole capacity, the observation window counted, and so spends more than it was given.

    Args:
        rounding: `exact` spends the budget; `original` cuts off fractions, as the authors' code does.
    """

    status = "numbers"

    def __init__(self, rounding: Literal["exact", "original"] = "exact") -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, _ = scores.shape
        protected = protected_of(scores)
        total = (budget.double() - protected).clamp_min(0) * layers
        weight = self.weights(scores)
        share = weight / weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)  # [L, B]
        wanted = share.double() * total
        if self.rounding == "original":
            wanted = (share * total.float()).floor().double()
        return (wanted + protected).unsqueeze(-1).expand(layers, batch, heads)

    @staticmethod
    def weights(scores: Tensor) -> Tensor:
        """Entropies [L, B] in [0, 1] of scores [L, B, H, S], protected entries left out."""
        free = scores.isfinite()
        mass = torch.where(free, scores, 0.0).clamp_min(0).flatten(2)
        share = mass / mass.sum(-1, keepdim=True).clamp_min(torch.finfo(mass.dtype).tiny)
        entropy: Tensor = -torch.special.xlogy(share, share).sum(-1)
        return entropy / free.flatten(2).sum(-1).clamp_min(2).float().log()
