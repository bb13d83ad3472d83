"""Another scorer's scores, chunk by chunk."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError


class Chunked(Scorer):
    """Consecutive tokens are kept or evicted together, as units of meaning (ChunkKV, arXiv 2502.00299).

    score_j = mean over the entries of j's chunk of `base`'s scores, chunk j // size. Budgets are exact: of the chunk
    that does not fit as a whole, the first entries stay. ChunkKV adds up the attention of the last queries over chunks
    of 10 tokens (`chunkkv.yaml`); kvpress wraps any scorer, with the mean over chunks of 20. The two differ in the last
    chunk of a prompt only, if it is shorter. That upper layers take over the choice of a lower one, ChunkKV's way to
    score less often, is left out.

    Args:
        base: the scores to start from.
        size: tokens of a chunk; chunks are counted from the prompt's first token.
        reduce: mean, sum or maximum over the entries of a chunk.
    """

    status = "description"

    def __init__(self, base: Scorer, size: int = 10, reduce: Literal["mean", "sum", "max"] = "mean") -> None:
        super().__init__()
        if size < 1:
            raise UserError(f"size={size}: expected at least one token per chunk")
        self._builds_on(base)
        self.base = base
        self.size = size
        self.reduce = reduce

    def forward(self, obs: Observation) -> Tensor:
        scores, valid = self.base(obs).float(), obs.valid
        chunk = obs.positions.clamp(min=0) // self.size
        # Entries are in position order, so counting where the chunk changes numbers chunks by slots, however far apart.
        changes = torch.cat([torch.zeros_like(chunk[..., :1]), (chunk.diff(dim=-1) != 0).long()], -1)
        place = changes.cumsum(-1)
        start = -torch.inf if self.reduce == "max" else 0.0
        members = torch.where(valid, scores, start)
        if self.reduce == "max":
            whole = torch.full_like(scores, start).scatter_reduce(-1, place, members, "amax")
        else:
            whole = torch.zeros_like(scores).scatter_add(-1, place, members)
        if self.reduce == "mean":
            entries = torch.zeros_like(scores).scatter_add(-1, place, valid.float())
            whole = whole / entries.clamp(min=1)
        return whole.gather(-1, place)
