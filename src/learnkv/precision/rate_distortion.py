"""Bytes shared out by the errors of codes: training-free."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.precision import Level
from learnkv.errors import UserError
from learnkv.precision.shared import SharedPrecision

_LEAST = 1e-12  # utility of entries without any


class RateDistortion(SharedPrecision):
    """Minimises the sum of score * distortion over entries within each head's bytes, without training (RDKV).

    RDKV (arXiv 2605.08317) gives every value token one of 0, 2, 4, 8 and 16 bits such that the sum of its attention
    times the relative squared error of these bits is least, and key channels likewise, half of the bits each, equally
    many in every head. Here one choice serves the key and the value of an entry, key channels have equal bits, budgets
    are met exactly, and scales, positions and tables are counted.

    Args:
        menu: levels as bits of keys and values, in ascending order of their bytes.
        distortion: relative squared error of each; those of the paper's repository are 0.295, 0.0124 and 5.5e-5 at 2, 4
            and 8 bits, means over keys and values.
    """

    status = "description"
    label = "rate-distortion"
    raw_scores = True

    def __init__(
        self,
        menu: Sequence[str] = ("2", "4", "8", "16"),
        distortion: Sequence[float] = (0.295, 0.0124, 5.5e-5, 0.0),
    ) -> None:
        super().__init__(menu)
        if len(distortion) != len(menu) or not all(error >= 0 for error in distortion):
            raise UserError(f"distortion={list(distortion)}: expected {len(menu)} numbers of 0 or more")
        self.distortion = tuple(distortion)

    @property
    def reference(self) -> Level:
        return self.levels[len(self.levels) // 2]

    def quality(self) -> Tensor:
        return 1 - torch.tensor(self.distortion, dtype=torch.float64).view(1, 1, -1)

    def utility(self, scores: Tensor) -> Tensor:
        return scores.clamp_min(_LEAST).log()
