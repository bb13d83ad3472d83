"""Fixed shares of what is kept at each level of precision."""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.precision import LevelPlan
from learnkv.errors import UserError
from learnkv.precision.shared import SharedPrecision

_TOLERANCE = 1e-6


class FixedTiers(SharedPrecision):
    """Tiers set by hand: the best entries that are kept get the highest level, the next ones the next, in fixed shares.

    Spherical KV and MiKV (arXiv 2402.18096) have such tiers by importance; shares here are of all heads together where
    budgets are by one ranking of scores, of each head where heads have budgets of their own.

    Args:
        menu: levels as bits of keys and values, such as K4V3, in ascending order of their bytes; at most five.
        shares: of the kept entries at each level; they sum to 1.
    """

    def __init__(self, menu: Sequence[str] = ("K4V2", "K8V3"), shares: Sequence[float] = (0.75, 0.25)) -> None:
        super().__init__(menu)
        if len(shares) != len(menu) or not all(0 < share < 1 for share in shares):
            raise UserError(f"shares={','.join(map(str, shares))}: expected {len(menu)} numbers between 0 and 1")
        if abs(sum(shares) - 1) > _TOLERANCE:
            raise UserError(f"shares={','.join(map(str, shares))}: expected a sum of 1, got {sum(shares):g}")
        self.parts = tuple(shares)
        self.label = "+".join(f"{name}:{share:g}" for name, share in zip(menu, shares, strict=True))

    def quality(self) -> Tensor:
        """Of an entry at any level, which `shares` does not read."""
        return torch.ones(1, 1, len(self.menu), dtype=torch.float64)

    def utility(self, scores: Tensor) -> Tensor:
        return scores

    def used(self, head_dims: Sequence[int]) -> list[bool]:
        return [True] * len(self.menu)

    def shares(
        self, scores: Tensor, budget: Tensor, head_dims: Sequence[int], unprotected: Tensor | None = None
    ) -> LevelPlan:
        rows = _rows(scores, budget)
        at_least = self._at_least(budget.to(scores.device), (rows > -torch.inf).sum(-1), head_dims)
        kept = _rank(rows) < at_least[0].unsqueeze(-1)
        order = rows if unprotected is None else _rows(unprotected, budget)
        best = _rank(order.masked_fill(~kept, -torch.inf))
        numbers = torch.stack([best < count.unsqueeze(-1) for count in at_least])
        layers, batch, heads, slots = scores.shape
        if budget.dim() == 3:
            of_heads = numbers.view(-1, layers, batch, heads, slots).sum(-1)
        else:
            of_heads = numbers.view(-1, batch, layers, heads, slots).transpose(1, 2).sum(-1)
        counts = of_heads - torch.cat([of_heads[1:], torch.zeros_like(of_heads[:1])])
        return LevelPlan(self.levels, counts, of_heads.double(), self.used(head_dims), unprotected)

    def _at_least(self, budget: Tensor, entries: Tensor, head_dims: Sequence[int]) -> Tensor:
        """Entries of each level or a higher one [M, ...] within budgets [...]; the largest head counts for all."""
        steps = self._steps(head_dims).amax(1).double()
        above = torch.tensor([sum(self.parts[level:]) for level in range(len(self.parts))], dtype=torch.float64)
        lowest = (budget.double() / (steps @ above)).floor()
        candidates = lowest.unsqueeze(-1) + torch.arange(len(steps) + 1, device=budget.device)
        candidates = candidates.minimum(entries.unsqueeze(-1))
        counts = (candidates.unsqueeze(-1) * above.to(budget.device) + _TOLERANCE).floor()
        counts[..., 0] = candidates
        fits = (counts @ steps.to(budget.device)) <= budget.unsqueeze(-1)
        most = torch.where(fits, candidates, 0).argmax(-1)
        taken = counts.gather(-2, most[..., None, None].expand(*most.shape, 1, len(steps))).squeeze(-2)
        return taken.movedim(-1, 0).long()


def tiers_of(text: str) -> FixedTiers | None:
    """Tiers from levels with their shares, as in `K4V2:0.75+K8V3:0.25`; None for other text.

    Raises:
        UserError: for shares that do not sum to 1, or levels that there are not.
    """
    matches = [re.fullmatch(r"(\w+):(\d*\.?\d+)", part) for part in text.split("+")]
    tiers = [match for match in matches if match is not None]
    if len(tiers) < len(matches):
        return None
    return FixedTiers([tier[1] for tier in tiers], [float(tier[2]) for tier in tiers])


def _rows(scores: Tensor, budget: Tensor) -> Tensor:
    """Scores [L, B, H, S] of whatever shares a budget: [L, B, H, S] or [B, L*H*S]."""
    return scores if budget.dim() == 3 else scores.transpose(0, 1).flatten(1)


def _rank(rows: Tensor) -> Tensor:
    """Rank of every entry in its row, 0 for the best."""
    order = rows.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(rows.shape[-1], device=rows.device).expand_as(order)
    )
