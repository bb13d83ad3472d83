"""One ranking over all layers and heads."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator
from learnkv.ops.ranked_counts import ranked_counts


class Flat(Allocator):
    """A head gets as many entries as it has among the best of the whole model.

    Scores must be comparable between layers. LayerDefensiveKV (`layer_defensivekv`) splits its budget this way, and
    KVzip nearly so. No head is given a floor. In LayerDefensiveKV's own code a layer of small scores may lose all its
    entries, the newest ones included; here the policy's sinks and recent tokens stay in every head and count towards
    the budget.

    Args:
        rounding: `exact`, or `kvzip`: what lies strictly above the score of the last entry that fits, which loses that
            entry and all that are tied with it, unless everything fits.
    """

    def __init__(self, rounding: Literal["exact", "kvzip"] = "exact") -> None:
        super().__init__()
        self.rounding = rounding

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, slots = scores.shape
        places = torch.round(budget.double() * layers * heads).long()  # [B]
        if self.rounding == "exact":
            return ranked_counts(scores.detach(), places)
        flat = scores.transpose(0, 1).flatten(1)  # [B, L*H*S]
        ordered = flat.sort(dim=-1, descending=True).values
        above = flat > ordered.gather(-1, (places - 1).clamp(min=0).unsqueeze(-1))
        valid = flat > -torch.inf
        best = torch.where((places >= valid.sum(-1)).unsqueeze(-1), valid, above)
        return best.view(batch, layers, heads, slots).sum(-1).transpose(0, 1).double()
