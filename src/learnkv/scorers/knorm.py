"""Scores from the norm of the keys."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer


class Knorm(Scorer):
    """Minus the L2 norm of the key: entries with small keys attract attention (arXiv 2406.11430).

    The authors leave the first two layers whole and protect nothing; kvpress treats all layers alike, as here.
    """

    status = "numbers"

    def forward(self, obs: Observation) -> Tensor:
        norm: Tensor = obs.keys.float().norm(dim=-1)
        return -norm
