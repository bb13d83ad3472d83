"""Scores that favour tokens which no other head keeps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.reduce_layers import token_index


class KVEC(Scorer):
    """Another method's scores, lower for tokens that earlier heads or layers keep already (K-VEC, arXiv 2606.29563).

    Source: abstract. It says that methods keep the same tokens in many heads, and that a module across heads and one
    across layers raise the coverage, the number of distinct tokens kept anywhere, at an equal budget. How is our
    reading: heads choose one after the other, layer by layer from the first, each by
    score_j - weight * (largest - smallest score of the head) if an earlier one has kept token j. With `weight: 0`, or
    in the first head, these are the base's scores. `CompressedCache.coverage` is what a cache covers.

    Args:
        base: the scores to start from.
        weight: how much a kept token loses, as a part of the spread of the head's scores.
        heads: whether earlier heads of a layer count.
        layers: whether earlier layers count.
    """

    status = "abstract"

    def __init__(self, base: Scorer, weight: float = 0.1, heads: bool = True, layers: bool = True) -> None:
        super().__init__()
        if weight < 0:
            raise UserError(f"weight={weight}: expected 0 or more")
        self._builds_on(base)
        self.base, self.weight = base, weight
        self.heads, self.layers = heads, layers

    def forward(self, obs: Observation) -> Tensor:
        return self.base(obs)

    def refine_layers(self, observations: Sequence[Observation], scores: Tensor, budgets: Tensor) -> Tensor:
        tokens, total = token_index(observations, scores.device)
        earlier = torch.zeros(scores.shape[1], total, dtype=torch.bool, device=scores.device)  # kept by layers before
        adjusted = []
        for index, own, budget in zip(tokens, scores, budgets, strict=True):
            counted = earlier if self.layers else torch.zeros_like(earlier)
            kept, layer = earlier.clone(), []
            for head in range(own.shape[1]):
                lowered = self._lowered(own[:, head], counted.gather(1, index[:, head]))
                layer.append(lowered)
                place = lowered.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
                chosen = (place < budget[:, head : head + 1]) & (lowered > -torch.inf)
                kept = _marked(kept, index[:, head], chosen)
                counted = _marked(counted, index[:, head], chosen) if self.heads else counted
            earlier = kept
            adjusted.append(torch.stack(layer, 1))
        return torch.stack(adjusted)

    def _lowered(self, scores: Tensor, covered: Tensor) -> Tensor:
        """Scores [B, S] of one head, less where a token is `covered`."""
        finite = scores.isfinite()
        spread = scores.masked_fill(~finite, -torch.inf).amax(-1) - scores.masked_fill(~finite, torch.inf).amin(-1)
        return scores - (self.weight * spread.clamp(min=0)).unsqueeze(-1) * covered


def _marked(tokens: Tensor, index: Tensor, chosen: Tensor) -> Tensor:
    """Tokens [B, N] with those at `index` [B, S] set that are `chosen`."""
    return tokens | torch.zeros_like(tokens, dtype=torch.uint8).scatter_reduce(1, index, chosen.byte(), "amax").bool()
