"""A learned correction of a heuristic's scores by a low-rank gate with sinks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnkv.errors import UserError
from learnkv.observation import Observation
from learnkv.scorers.base import Scorer
from learnkv.scorers.residual import Residual, unit


class GateScorer(Residual):
    """A heuristic's scores plus how far a token's own low-rank key beats learned sinks when its own query looks.

    For each kv head q = norm(W_q x), k = norm(W_k x) in `rank` dimensions and sinks k_s: the correction is
    scale * (q k / sqrt(rank) + b - log sum_s exp(q k_s / sqrt(rank))). `scale` and b start at zero.

    Over `Constant`, the sigmoid of it has the form of Fast KVzip's gate (arXiv 2601.17668), which `FastKVzip` computes
    as published: one query, with a bias, for every query head, the mean of their sigmoids, learned weights in both
    norms, and no `scale`. Here a kv head has one query, norms have no weights, and hidden states have mean square 1.

    Args:
        base: the heuristic to start from; `Residual` says which are refused.
        num_layers: layers of the model; 0 until `train.py` fills in this and the other sizes of the model.
        num_heads: kv heads per layer.
        hidden_size: E of the model.
        rank: dimensions of query and key.
        sinks: learned keys per head.
    """

    def __init__(
        self,
        base: Scorer,
        num_layers: int = 0,
        num_heads: int = 0,
        hidden_size: int = 0,
        rank: int = 8,
        sinks: int = 8,
    ) -> None:
        super().__init__(base, num_layers, num_heads)
        if rank < 1 or sinks < 1:
            raise UserError(f"rank={rank} sinks={sinks}: expected at least 1 of each")
        self._reads_tokens("hidden")
        scale = max(1, hidden_size) ** -0.5
        self.query = nn.Parameter(torch.randn(num_layers, num_heads, hidden_size, rank) * scale)
        self.key = nn.Parameter(torch.randn(num_layers, num_heads, hidden_size, rank) * scale)
        self.sink = nn.Parameter(torch.randn(num_layers, num_heads, rank, sinks))
        self.own = nn.Parameter(torch.zeros(num_layers, num_heads, 1))
        self.scale = nn.Parameter(torch.zeros(num_layers, num_heads, 1))

    def correction(self, seen: Observation, prior: Tensor) -> Tensor:
        return self.of_tokens(seen).squeeze(-1)

    def figures(self, seen: Observation) -> Tensor:
        """The correction itself, [B, H, S, 1]."""
        assert seen.hidden is not None
        layer, token = seen.layer_idx, unit(seen.hidden).unsqueeze(1)  # [B, 1, S, E]
        query, key = (
            F.rms_norm(token @ weight[layer], (weight.shape[-1],), eps=1e-6) for weight in (self.query, self.key)
        )
        size = query.shape[-1] ** -0.5
        own = (query * key).sum(-1) * size + self.own[layer]
        others = (query @ self.sink[layer] * size).logsumexp(-1)
        correction: Tensor = self.scale[layer] * (own - others)
        return correction.unsqueeze(-1)
