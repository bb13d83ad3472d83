"""One score for all entries."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer


class Constant(Scorer):
    """No entry before another: what a learned scorer has for its base that starts from nothing.

    Ties are broken in favour of entries near the beginning of the prompt.
    """

    def forward(self, obs: Observation) -> Tensor:
        return torch.zeros(obs.valid.shape, device=obs.keys.device)
