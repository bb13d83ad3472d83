"""One score for all entries."""

import torch
from torch import Tensor

from learnkv.observation import Observation
from learnkv.scorers.base import Scorer


class Constant(Scorer):
    """No entry before another: what a learned scorer has for its base that starts from nothing.

    Ties are broken in favour of entries near the beginning of the prompt.
    """

    def forward(self, seen: Observation) -> Tensor:
        return torch.zeros(seen.valid.shape, device=seen.keys.device)
