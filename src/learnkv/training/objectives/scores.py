"""Regression of a policy's scores on those of a slower scorer."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.ops.normal_scores import normal_scores
from learnkv.scorers.base import Scorer
from learnkv.training.objectives.base import Comparison, Objective


class ScoreRegression(Objective):
    """Mean squared difference between the policy's scores and those of `target`, over the entries that are in question.

    A scorer that reads the prompt again (KVzip) is imitated by one that does not: no continuation is read, and what
    eviction does to the model's output is not asked. Fast KVzip and KVzap are trained in this way.

    Args:
        target: gives the scores that are to be matched; it is not trained.
        of: `ranks` matches the normal scores of the target's ranks within its layer, the scale that `LearnedScorer`
            has; `scores` the target's own numbers (KVzap: those of KVzip with `normalized` and `log`).
    """

    name = "score_mse"
    reads = False
    plans = True

    def __init__(self, target: Scorer, of: Literal["ranks", "scores"] = "ranks") -> None:
        super().__init__()
        self.target = target.requires_grad_(False)
        self.targets = (target,)
        self.of = of

    def forward(self, seen: Comparison) -> Tensor:
        assert seen.plan is not None
        scores, wanted = seen.plan.scores, seen.targets[self.target].float()
        asked = scores.isfinite()  # neither protected nor padding
        if self.of == "ranks":
            wanted = torch.stack([normal_scores(one, free) for one, free in zip(wanted, asked, strict=True)])
        apart = torch.where(asked, scores - wanted, 0.0).square()
        return apart.sum((0, 2, 3)) / asked.sum((0, 2, 3)).clamp_min(1)
