"""Regression of a policy's scores on those of a slower scorer."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.normal_scores import normal_scores
from learnkv.training.objectives.base import Comparison, Objective

_LEAST = 1e-6


class ScoreRegression(Objective):
    """Distance between the policy's scores and those of `target`, averaged over the entries that may be evicted.

    Distils a scorer with extra passes over the prompt (KVzip) into one without: no continuation is read, and the effect
    of eviction on the model's output is not part of the loss. Fast KVzip and KVzap are trained in this way.

    Args:
        target: scorer to match; it is not trained.
        of: squares of differences to the normal scores of the target's `ranks` within its layer, the scale that
            `LearnedScorer` has, or to its own `scores` (KVzap: those of KVzip with `normalized` and `log`); or, for
            scores within [0, 1] such as KVzip's, their cross-entropy to the policy's as `probabilities` (Fast KVzip),
            which must be within (0, 1], or to the sigmoid of the policy's, its `logits`: these are comparable
            between layers, and the most important entries have the largest weight.
    """

    name = "score_distance"
    reads = False
    plans = True
    budgets = False

    def __init__(self, target: Scorer, of: Literal["ranks", "scores", "logits", "probabilities"] = "ranks") -> None:
        super().__init__()
        self.target = target.requires_grad_(False)
        self.targets = (target,)
        self.of = of

    def forward(self, inputs: Comparison) -> Tensor:
        assert inputs.plan is not None
        scores, target = inputs.plan.raw_scores, inputs.targets[self.target].float()
        evictable = scores.isfinite()  # neither protected nor padding
        if self.of == "ranks":
            target = torch.stack([normal_scores(*layer) for layer in zip(target, evictable, strict=True)])
        if self.of in ("logits", "probabilities"):
            if self.of == "probabilities":
                inside = scores.detach()[evictable]
                if not bool(((inside > 0) & (inside <= 1) | inside.isnan()).all()):  # at 0 there would be no gradient
                    raise UserError(
                        "objective: of=probabilities expects scores above 0 and up to 1, as of a GateScorer over "
                        f"Constant with scaled=false; got {float(inside.min()):.3g} to {float(inside.max()):.3g}"
                    )
                scores = scores.clamp(_LEAST, 1 - _LEAST).logit()
            distance = F.binary_cross_entropy_with_logits(
                scores.masked_fill(~evictable, 0.0), target.masked_fill(~evictable, 0.0).clamp(0, 1), reduction="none"
            )
            distance = distance.masked_fill(~evictable, 0.0)
        else:
            distance = torch.where(evictable, scores - target, 0.0).square()
        return distance.sum((0, 2, 3)) / evictable.sum((0, 2, 3)).clamp_min(1)
