"""A heuristic's scores, moved by something learned."""

from abc import abstractmethod

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.observation import Observation
from learnkv.ops.normal_scores import normal_scores
from learnkv.scorers.base import Judgement, Scorer
from learnkv.scorers.tokenwise import Tokenwise


class Residual(Tokenwise):
    """Normal scores of a heuristic's ranks plus a correction that is learned, entry by entry, and zero at first.

    At first every order, within a head and between the heads of a layer, is the heuristic's, ties included. A scorer
    that starts from nothing has `Constant` for its base.

    Args:
        base: the heuristic to start from: any whose scores alone decide. One that orders within each head by how much
            that head keeps (`CriticalKV`, a `LearnedScorer` with `sampling`) is refused.
        num_layers, num_heads: the model's.
    """

    def __init__(self, base: Scorer, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self._builds_on(base)
        self.base = base
        self.shape = (num_layers, num_heads)

    @abstractmethod
    def correction(self, seen: Observation, prior: Tensor) -> Tensor:
        """[B, H, S], differentiable, from what is seen and the heuristic's normal scores [B, H, S]."""

    def forward(self, seen: Observation) -> Tensor:
        return self.judge(seen).scores

    def judge(self, seen: Observation) -> Judgement:
        layers, heads = self.shape
        if seen.layer_idx >= layers or seen.keys.shape[1] != heads:
            raise UserError(
                f"num_layers={layers} num_heads={heads}: the model has layer {seen.layer_idx} with {seen.keys.shape[1]}"
            )
        with torch.no_grad():
            start = self.base(seen)
            prior = normal_scores(start, seen.valid)
        return Judgement(prior + self.correction(seen, prior), start, prior)


def unit(vectors: Tensor) -> Tensor:
    """The same directions with mean square 1, float32 [..., F] from vectors [..., F]; zeros stay zeros."""
    vectors = vectors.float()
    return vectors * vectors.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
