"""Attention that entries have received since they were read."""

from dataclasses import dataclass

from torch import Tensor

from learnkv.core.observation import Observation, Statistic
from learnkv.ops.attention_columns import attention_columns


@dataclass(frozen=True)
class ReceivedAttention(Statistic):
    """Sum of the attention that an entry got from every query that saw it, its own included: [B, H, S, G]."""

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        received = attention_columns(
            chunk.queries,
            chunk.keys,
            query_positions=chunk.query_positions,
            positions=chunk.positions,
            valid=chunk.valid,
            scaling=chunk.scaling,
            terms=chunk.terms,
        ).transpose(2, 3)
        if gathered is not None:
            received[:, :, : gathered.shape[2]] += gathered
        return received
