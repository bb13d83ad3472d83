"""One ranking over all layers and heads."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.allocator import Allocator
from learnkv.errors import UserError
from learnkv.ops.ranked_counts import ranked_counts


class Flat(Allocator):
    """A head gets as many entries as it has among the best of the whole model.

    Scores must be comparable between layers. LayerDefensiveKV (`layer_defensivekv`) splits its budget this way, and
    KVzip nearly so. No head is given a floor. In LayerDefensiveKV's own code a layer of small scores may lose all its
    entries, the newest ones included; here the policy's sinks and recent tokens stay in every head and count towards
    the budget.

    Args:
        rounding: `exact`; `kvzip`: what lies strictly above the score of the last entry that fits, which loses that
            entry and all that are tied with it, unless everything fits; `trimkv`: with a `floor`, a head's first token
            counts for the head before, as in DBTrimKV's code.
        floor: part of the mean budget that every head gets, whole entries, before all compete for the rest (DBTrimKV).
    """

    status = "numbers"

    def __init__(self, rounding: Literal["exact", "kvzip", "trimkv"] = "exact", floor: float = 0.0) -> None:
        super().__init__()
        if not 0 <= floor <= 1 or (floor and rounding == "kvzip"):
            raise UserError(f"floor={floor} rounding={rounding}: expected 0 to 1, and 0 for kvzip")
        self.rounding, self.floor = rounding, floor

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        layers, batch, heads, slots = scores.shape
        places = torch.round(budget.double() * layers * heads).long()  # [B]
        if self.floor:
            return self._above_floor(scores, budget.double())
        if self.rounding != "kvzip":
            return ranked_counts(scores.detach(), places)
        flat = scores.transpose(0, 1).flatten(1)  # [B, L*H*S]
        ordered = flat.sort(dim=-1, descending=True).values
        above = flat > ordered.gather(-1, (places - 1).clamp(min=0).unsqueeze(-1))
        valid = flat > -torch.inf
        best = torch.where((places >= valid.sum(-1)).unsqueeze(-1), valid, above)
        return best.view(batch, layers, heads, slots).sum(-1).transpose(0, 1).double()

    def _above_floor(self, scores: Tensor, budget: Tensor) -> Tensor:
        """Entries of each head among the best that fit above the floor, and the floor, [L, B, H]."""
        layers, batch, heads, _ = scores.shape
        counts = ranked_counts(scores.detach(), (layers * heads * budget * (1 - self.floor)).floor().long())
        if self.rounding == "trimkv":
            place = scores.detach().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            best = (place[..., 0] < counts).double().transpose(0, 1).flatten(1)  # [B, L*H] first tokens
            moved = counts.transpose(0, 1).flatten(1)
            moved[:, 1:] -= best[:, 1:]
            moved[:, :-1] += best[:, 1:]
            counts = moved.view(batch, layers, heads).transpose(0, 1)
        entries = (scores > -torch.inf).sum(-1)
        return (counts + (budget * self.floor).floor().view(1, -1, 1)).minimum(entries.double())
