"""Mean and covariance of a prompt's queries before rotation."""

from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic


@dataclass(frozen=True)
class QueryMoments(Statistic):
    """Mean and scatter of all queries but the first `sinks`, as they were before RoPE: [B, H, G, 1 + D, D].

    The first of the rows is the mean, the others are the sum of the outer products of deviations from it.
    Chunks are merged by their means, so that a large common part of all queries costs no precision.
    """

    sinks: int = 4

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        rope = chunk.rope
        queries = chunk.queries.float() if rope is None else rope.unrotate(chunk.queries)
        counted = (chunk.query_positions >= self.sinks)[:, None, :, None]  # [B, 1, T, 1]
        queries = torch.where(counted, queries, 0.0)
        number = counted.sum(2, keepdim=True)  # [B, 1, 1, 1]
        mean = queries.sum(2, keepdim=True) / number.clamp(min=1)  # [B, H*G, 1, D]
        apart = torch.where(counted, queries - mean, 0.0)
        scatter = apart.transpose(2, 3) @ apart
        if gathered is not None:
            gathered = gathered.flatten(1, 2)
            before = (chunk.length - self.sinks).clamp(min=0).view(-1, 1, 1, 1) - number
            shift = mean - gathered[:, :, :1]
            part = number / (before + number).clamp(min=1)
            scatter = scatter + gathered[:, :, 1:] + before * part * shift.transpose(2, 3) * shift
            mean = gathered[:, :, :1] + part * shift
        moments: Tensor = torch.cat([mean, scatter], 2).unflatten(1, (chunk.keys.shape[1], -1))
        return moments

    def moments(self, obs: Observation) -> tuple[Tensor, Tensor]:
        """Mean [B, H*G, D] and covariance [B, H*G, D, D], divided by the number of queries."""
        gathered = obs.statistics[self].flatten(1, 2)
        number = (obs.length - self.sinks).clamp(min=1).view(-1, 1, 1, 1)
        return gathered[:, :, 0], gathered[:, :, 1:] / number
