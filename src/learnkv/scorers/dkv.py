"""Sizes of keys and values in a random sketch."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.hash_bits import WORD, hash_bits


class DKV(Scorer):
    """Sizes of key and value in a few random directions, the variant VaSE-DKV (VaSE, arXiv 2606.03928).

    score_j = |k_j G|^2 |v_j G|^2 over the sum of these in the head, with a Gaussian G [D, rank] of variance 1 / rank:
    approximate leverage scores of CUR decompositions, whose randomness keeps a more diverse cache. No attention is
    read. The published code draws G once per prompt and layer, or anew for every eviction (`resample`), has rank 20,
    evicts every 64 tokens and keeps the first 4 and the last 64 in any case. Here G is a function of seed and layer,
    and with `resample` of the tokens read.

    Args:
        rank: directions.
        resample: whether every eviction has directions of its own.
        seed: another seed, other directions.
    """

    status = "numbers"

    def __init__(self, rank: int = 20, resample: bool = False, seed: int = 0) -> None:
        super().__init__()
        if rank < 1:
            raise UserError(f"rank={rank}: expected at least one direction")
        self.rank, self.resample, self.seed = rank, resample, seed

    def forward(self, obs: Observation) -> Tensor:
        return self.shares(obs, self.directions(obs))

    def shares(self, obs: Observation, directions: Tensor) -> Tensor:
        """Scores [B, H, S] for directions [B, 1, D, R]."""
        present = obs.valid.unsqueeze(-1)
        of_keys, of_values = (
            (part.float().masked_fill(~present, 0.0) @ directions).square().sum(-1) for part in (obs.keys, obs.values)
        )
        scores = of_keys * of_values
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)

    def directions(self, obs: Observation) -> Tensor:
        """G [B, 1, D, R]."""
        dim = obs.keys.shape[3]
        word = hash_bits(torch.full((len(obs.keys), 1), self.seed & WORD, device=obs.keys.device))
        word = hash_bits(word ^ obs.layer_idx)
        if self.resample:
            word = hash_bits(word ^ obs.length.view(-1, 1))
        word = hash_bits(word ^ torch.arange(dim * self.rank, device=word.device))
        directions: Tensor = torch.special.ndtri(((word >> 9).float() + 0.5) / 2**23) / self.rank**0.5
        return directions.view(-1, 1, dim, self.rank)
