"""A heuristic's scores plus a learned correction."""

from abc import abstractmethod

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer, Scores
from learnkv.errors import UserError
from learnkv.ops.normal_scores import normal_scores
from learnkv.scorers.tokenwise import Tokenwise


class Residual(Tokenwise):
    """Normal scores of a heuristic's ranks plus a learned correction per entry, which is zero at initialisation.

    At initialisation every order, within a head and between the heads of a layer, is the heuristic's, ties included. A
    scorer without a heuristic has `Constant` as its base.

    Args:
        base: the heuristic: any whose scores alone decide. One that ranks within each head by how much that head keeps
            (`CriticalKV`, a `LearnedScorer` with `sampling`) is refused.
        num_layers, num_heads: the model's.
    """

    def __init__(self, base: Scorer, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self._builds_on(base)
        self.base = base
        self.shape = (num_layers, num_heads)

    @abstractmethod
    def correction(self, obs: Observation, baseline: Tensor) -> Tensor:
        """[B, H, S], differentiable, from the observation and the heuristic's normal scores `baseline` [B, H, S]."""

    def forward(self, obs: Observation) -> Tensor:
        return self.score(obs).scores

    def score(self, obs: Observation) -> Scores:
        layers, heads = self.shape
        if obs.layer_idx >= layers or obs.keys.shape[1] != heads:
            raise UserError(
                f"num_layers={layers} num_heads={heads}: the model has layer {obs.layer_idx} with {obs.keys.shape[1]}"
            )
        with torch.no_grad():
            baseline = self.base(obs)
            scaled = normal_scores(baseline, obs.valid)
        return Scores(scaled + self.correction(obs, scaled), baseline, scaled)


def unit(vectors: Tensor) -> Tensor:
    """The same directions with mean square 1, float32 [..., F] from vectors [..., F]; zeros stay zeros."""
    vectors = vectors.float()
    return vectors * vectors.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()
