"""Scores from the position alone."""

from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer


class PromptOrder(Scorer):
    """The first entries of the prompt, in order: a control for the protected tokens alone.

    No score of any kind decides; beside sinks and recent tokens the budget goes to the beginning of the prompt.
    """

    def forward(self, obs: Observation) -> Tensor:
        return -obs.positions.float()
