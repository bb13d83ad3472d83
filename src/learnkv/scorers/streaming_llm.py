"""StreamingLLM scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError

ABOVE_ALL = 2.0**24  # float32 counts positions exactly up to here


class StreamingLLM(Scorer):
    """The first entries of the prompt, then the latest (StreamingLLM, arXiv 2309.17453).

    As in the other policies here, keys keep the rotation of their prompt position.

    Args:
        sinks: number of first entries that come before all others.
    """

    status = "numbers"

    def __init__(self, sinks: int = 4) -> None:
        super().__init__()
        if sinks < 0:
            raise UserError(f"sinks={sinks}: expected 0 or more")
        self.sinks = sinks

    def forward(self, obs: Observation) -> Tensor:
        position = obs.positions.float()
        return torch.where(position < self.sinks, ABOVE_ALL - position, position)
