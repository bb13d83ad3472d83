"""Scores from the position alone."""

from torch import Tensor

from learnkv.observation import Observation
from learnkv.scorers.base import Scorer


class PromptOrder(Scorer):
    """The first entries of the prompt, in order: what a policy's protected tokens are worth by themselves.

    No score of any kind decides; beside sinks and recent tokens the budget goes to the beginning of the prompt.
    """

    def forward(self, seen: Observation) -> Tensor:
        return -seen.positions.float()
