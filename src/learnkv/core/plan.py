"""What to keep of a prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.allocator import Baseline
from learnkv.core.scorer import Scores
from learnkv.ops.select import select


@dataclass(frozen=True)
class Plan:
    """What to keep of a prompt, before anything is kept."""

    scores: Tensor
    """[L, B, H, S] float32; +inf protected, -inf no entry."""
    wanted: Tensor
    """[L, B, H] entries as the allocator asks for them, differentiable."""
    budgets: Tensor
    """[L, B, H] int64, each row sums to its budget exactly."""
    protected: Tensor
    """[B] entries per head that every policy keeps: sinks and most recent."""
    total: int
    """Sum of `budgets`, known on the host from the budget alone."""
    judged: Tensor
    """[L, B, H, S] what the scores were before each head's budget was known, by which budgets may have been shared."""

    @property
    def kept(self) -> Tensor:
        """[L, B, H, S] True for the entries that are kept."""
        kept = torch.zeros(self.scores.numel(), dtype=torch.bool, device=self.scores.device)
        kept[select(self.scores.flatten(0, 2), self.budgets.flatten(), self.total)] = True
        return kept.view(self.scores.shape)


def changed(plan: Plan, other: Plan) -> Tensor:
    """Fraction [B] of the entries kept by `plan` that `other`, of the same prompts and budget, does not keep."""
    kept = plan.kept
    return (kept & ~other.kept).sum((0, 2, 3)) / kept.sum((0, 2, 3))


def started_at(judged: Sequence[Scores], device: torch.device) -> Baseline | None:
    """Where the scores of all layers started, None for a heuristic's."""
    starts, priors = (
        [one.to(device) for one in some if one is not None] for some in list(zip(*judged, strict=True))[1:]
    )
    return Baseline(torch.stack(starts), torch.stack(priors)) if starts else None
