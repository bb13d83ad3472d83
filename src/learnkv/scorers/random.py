"""Random scores, the floor that every method has to beat."""

import torch
from torch import Tensor

from learnkv.observation import Observation
from learnkv.ops.mix import WORD, mix
from learnkv.scorers.base import Scorer


class Random(Scorer):
    """Uniform noise in [0, 1), a fixed function of seed, layer, kv head and prompt position.

    Args:
        seed: another seed, another choice.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, seen: Observation) -> Tensor:
        heads = torch.arange(seen.positions.shape[1], device=seen.positions.device).view(-1, 1)
        word = mix(torch.full_like(heads, self.seed & WORD))
        for key in (torch.full_like(heads, seen.layer_idx), heads, seen.positions.long() & WORD):
            word = mix(word ^ key)
        return (word >> 8).float() / 2**24
