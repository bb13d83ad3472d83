"""Mean query of the first and the last tokens of a prompt, before rotation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic


@dataclass(frozen=True)
class PooledQueries(Statistic):
    """Sum over the first `size` tokens of a prompt and all heads, and the number of vectors: [B, D + 1].

    Args:
        size: first tokens, and last ones.
    """

    size: int

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        counted = (chunk.query_positions >= 0) & (chunk.query_positions < self.size)
        new = _summed(chunk, chunk.queries, counted)
        return new if gathered is None else gathered + new

    def mean(self, obs: Observation) -> Tensor:
        """[B, D] over the first and the last `size` tokens; tokens that are both count twice."""
        last = obs.queries[:, :, -self.size :]
        total = obs.statistics[self] + _summed(obs, last, obs.query_positions[:, -self.size :] >= 0)
        return total[:, :-1] / total[:, -1:]


def _summed(obs: Observation, queries: Tensor, counted: Tensor) -> Tensor:
    """Sum over counted [B, T] tokens of queries [B, H*G, T, D] before rotation, and how many these are, [B, D + 1]."""
    rope = obs.rope
    queries = queries.float() if rope is None else rope.unrotate(queries)
    total = torch.where(counted[:, None, :, None], queries, 0.0).sum((1, 2))
    return torch.cat([total, counted.sum(-1, keepdim=True).float() * queries.shape[1]], 1)
