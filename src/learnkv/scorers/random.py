"""Random scores, the floor that every method has to beat."""

import torch
from torch import Tensor

from learnkv.observation import Observation
from learnkv.scorers.base import Scorer

WORD = 0xFFFFFFFF  # hashing is done in 32-bit words held in int64, which torch has on every device


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
        word = _mix(torch.full_like(heads, self.seed & WORD))
        for key in (torch.full_like(heads, seen.layer_idx), heads, seen.positions.long() & WORD):
            word = _mix(word ^ key)
        return (word >> 8).float() / 2**24


def _mix(word: Tensor) -> Tensor:
    """A bijection of 32-bit words after which every bit depends on every other (Wellons' lowbias32)."""
    word = (word + 0x9E3779B9) & WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & WORD
    return word ^ (word >> 16)
