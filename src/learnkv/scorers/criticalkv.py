"""CriticalKV scores."""

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.output_projection import projected_l1


class CriticalKV(Scorer):
    """Another method's best entries, then those that weigh most in the output too (CriticalKV, arXiv 2502.03805).

    Of the n entries that a head keeps, the first floor(first_stage * n) have the highest scores s of `base`; the others
    the highest (s + epsilon) * N_j, where N_j = mean over the query heads of a kv head of |W_O v_j|_1 is what the entry
    contributes to the layer's output. How many entries a head keeps is decided on s alone, so that over `AdaKV` this is
    CriticalAdaKV. There kvpress lets `base` alone decide on what its AdaKV sets aside for a head, too.

    Args:
        base: the scores to start from, non-negative.
        first_stage: part of a head's budget that `base` alone decides.
        floor: part of the mean budget that `base` alone decides in every head, AdaKV's `floor` in kvpress.
        epsilon: added to scores before they are multiplied, so that zero scores are ranked by N_j.
    """

    status = "numbers"
    functions = frozenset({"projection"})

    def __init__(self, base: Scorer, first_stage: float = 0.5, floor: float = 0.0, epsilon: float = 1e-4) -> None:
        super().__init__()
        if not (0 <= first_stage <= 1 and 0 <= floor <= 1 and epsilon >= 0):
            raise UserError(f"first_stage={first_stage} floor={floor} epsilon={epsilon}: expected 0 to 1, epsilon >= 0")
        self._builds_on(base)
        self.base = base
        self.first_stage = first_stage
        self.floor = floor
        self.epsilon = epsilon

    def forward(self, obs: Observation) -> Tensor:
        return self.base(obs)

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        mean = budgets.double().mean(-1, keepdim=True)
        first = (
            (budgets.float() * self.first_stage).floor().maximum((self.floor * mean).floor()).unsqueeze(-1)
        )  # [B, H, 1]
        place = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        weighed = (scores + self.epsilon) * self.contributions(obs)
        return torch.where(place < first, torch.finfo(torch.float32).max, weighed)

    def contributions(self, obs: Observation) -> Tensor:
        """N_j [B, H, S]."""
        return projected_l1(obs.values, obs.projection).mean(2)
