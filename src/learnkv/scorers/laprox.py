"""LaProx scores."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.output_projection import projected_l2
from learnkv.ops.pool_apart import pool_apart


class LaProx(Scorer):
    """Attention times the size of the value in the layer's output, as a share of the layer (LaProx, arXiv 2605.07234).

    score_j = pool(|A_j|_2) * |W_O v_j|_2 over the sum of these over all kv heads and entries of the layer, with A_j the
    weights that the window's queries give to the entry. So layers compare, whatever the size of their values, and one
    ranking serves the whole model: the allocator `Flat`. Source: description. No code of the authors is public; what
    third parties read into the paper differs in how query heads of a kv head are joined, in pooling, and in the window
    (32 in the paper, 8 elsewhere). The window is kept in any case in all of them; here it is ranked by its own queries,
    and the sum is over the entries before it.

    Args:
        window: number of last prompt queries.
        kernel_size: neighbouring entries whose attention is averaged, odd; 1: none.
        group: what is joined over the query heads of a kv head: `attention`, averaged before its norm is taken, times
            the mean size of the value, as the paper says; or the `mean` or `sum` of the complete scores.
        shared: whether the kv heads of a layer have their mean score in common, a variant of one reading.
        epsilon: added to the norm of the attention, 1e-12 in one reading.
    """

    status = "description"
    functions = frozenset({"projection"})

    def __init__(
        self,
        window: int = 32,
        kernel_size: int = 7,
        group: Literal["attention", "mean", "sum"] = "attention",
        shared: bool = False,
        epsilon: float = 0.0,
    ) -> None:
        super().__init__()
        if window < 1 or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(f"window={window} kernel_size={kernel_size}: expected window >= 1 and an odd kernel_size")
        if epsilon < 0:
            raise UserError(f"epsilon={epsilon}: expected 0 or more")
        self.window, self.kernel_size = window, kernel_size
        self.group, self.shared, self.epsilon = group, shared, epsilon

    def forward(self, obs: Observation) -> Tensor:
        inside, valid = obs.in_window(self.window), obs.valid
        weights, _ = obs.window_attention(self.window)  # [B, H, G, W, S]
        if self.group == "attention":
            weights = weights.mean(2, keepdim=True)
        norms = weights.float().norm(dim=3) + self.epsilon
        attention = pool_apart(norms, inside.unsqueeze(2), valid.unsqueeze(2), self.kernel_size, "avg")
        values = obs.values.masked_fill(~valid.unsqueeze(-1), 0.0)
        sizes = projected_l2(values, obs.projection)  # [B, H, G, S]
        if self.group == "attention":
            sizes = sizes.mean(2, keepdim=True)
        scores = attention * sizes
        scores = scores.sum(2) if self.group == "sum" else scores.mean(2)
        past = valid & ~inside
        counted = past | ~past.any(-1, keepdim=True)  # a prompt within the window has no past
        total = scores.masked_fill(~(counted & valid), 0.0).sum((1, 2), keepdim=True)
        scores = scores / total.clamp(min=torch.finfo(scores.dtype).tiny)
        if not self.shared:
            return scores
        present = valid.sum(1, keepdim=True).clamp(min=1)
        return (scores.masked_fill(~valid, 0.0).sum(1, keepdim=True) / present).expand_as(scores)
