"""A number that is kept with every entry from one eviction to the next."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic


@dataclass(frozen=True)
class Carried(Statistic):
    """A number that a scorer's `carry` sets, [B, H, S, 1] float32; 0 for entries that are new."""

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        batch, heads, slots = chunk.valid.shape
        before = 0 if gathered is None else gathered.shape[2]
        new = chunk.keys.new_zeros(batch, heads, slots - before, 1, dtype=torch.float32)
        return new if gathered is None else torch.cat([gathered, new], 2)
