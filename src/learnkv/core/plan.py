"""The plan: what is kept of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.allocator import Baseline
from learnkv.core.finite import Invalid
from learnkv.core.precision import LevelPlan
from learnkv.core.scorer import Scores
from learnkv.ops.select import select


@dataclass(frozen=True)
class Plan:
    """Scores and budgets of a prompt, before anything is evicted."""

    scores: Tensor
    """[L, B, H, S] float32; +inf protected, -inf no entry."""
    wanted: Tensor
    """[L, B, H] entries that the allocator requests, differentiable."""
    budgets: Tensor
    """[L, B, H] int64, each row sums to its budget exactly."""
    protected: Tensor
    """[B] entries per head that every policy keeps: sinks and most recent."""
    total: int
    """Sum of `budgets`, known on the host from the budget alone."""
    raw_scores: Tensor
    """[L, B, H, S] the scores before `Scorer.refine`, by which budgets may have been shared."""
    invalid: tuple[Invalid, ...] = ()
    """Heads whose values may not be numbers, on a GPU, where nothing has been raised yet."""

    levels: LevelPlan | None = None
    """How many entries of each head are stored at each level of precision; None: all as they are."""

    @property
    def chosen(self) -> Tensor:
        """[L, B, H, S] int8 level of every entry, 1 … M of `levels`; 0: evicted."""
        assert self.levels is not None
        scores = self.scores.detach()
        if self.levels.order is not None:
            scores = self.levels.order.detach().masked_fill(~self.kept, -torch.inf)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        slots = torch.arange(order.shape[-1], device=order.device).expand_as(order)
        rank = torch.empty_like(order).scatter_(-1, order, slots)
        at_least = self.levels.counts.flip(0).cumsum(0)
        return torch.stack([rank < count.unsqueeze(-1) for count in at_least]).sum(0, dtype=torch.int8)

    @property
    def kept(self) -> Tensor:
        """[L, B, H, S] True for the entries that are kept."""
        kept = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.scores.device)
        kept[select(self.scores.flatten(0, 2), self.budgets.flatten(), self.total)] = True
        return kept.view(self.scores.shape)


def changed(plan: Plan, other: Plan) -> Tensor:
    """Fraction [B] of the entries kept by `plan` that `other`, of the same prompts and budget, does not keep."""
    kept = plan.kept
    return (kept & ~other.kept).sum((0, 2, 3)).float() / kept.sum((0, 2, 3))


def baseline_of(scores: Sequence[Scores], device: torch.device) -> Baseline | None:
    """The baseline of all layers' scores, None for a heuristic's."""
    plain = [layer.baseline.to(device) for layer in scores if layer.baseline is not None]
    scaled = [layer.baseline_scaled.to(device) for layer in scores if layer.baseline_scaled is not None]
    return Baseline(torch.stack(plain), torch.stack(scaled)) if plain else None
