"""Scores from the norm of the keys."""

from torch import Tensor

from learnkv.observation import Observation
from learnkv.scorers.base import Scorer


class Knorm(Scorer):
    """Minus the L2 norm of the key: entries with small keys attract attention (arXiv 2406.11430).

    The authors leave the first two layers whole and protect nothing; kvpress treats all layers alike, as here.
    """

    def forward(self, seen: Observation) -> Tensor:
        return -seen.keys.float().norm(dim=-1)
