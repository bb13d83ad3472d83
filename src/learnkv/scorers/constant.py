"""One score for all entries."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer


class Constant(Scorer):
    """The same score for every entry: the base of a learned scorer without a heuristic.

    Ties are broken in favour of entries near the beginning of the prompt.
    """

    def forward(self, obs: Observation) -> Tensor:
        return torch.zeros(obs.valid.shape, dtype=torch.float32, device=obs.keys.device)
