"""Random scores, the floor that every method has to beat."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.ops.hash_bits import WORD, hash_bits


class Random(Scorer):
    """Uniform noise in [0, 1), a fixed function of seed, layer, kv head and prompt position.

    Args:
        seed: another seed, another choice.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed

    def forward(self, obs: Observation) -> Tensor:
        heads = torch.arange(obs.positions.shape[1], device=obs.positions.device).view(-1, 1)
        word = hash_bits(torch.full_like(heads, self.seed & WORD))
        for key in (torch.full_like(heads, obs.layer_idx), heads, obs.positions.long() & WORD):
            word = hash_bits(word ^ key)
        return (word >> 8).float() / 2**24
