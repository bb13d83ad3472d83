"""A learned correction of a heuristic's scores by a low-rank gate with sinks."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.scorers.residual import Residual


class GateScorer(Residual):
    """A heuristic's scores plus Fast KVzip's gate (arXiv 2601.17668), a learned multiple of it for each head.

    The gate is `gate_scores`: the weight of the token's own low-rank key beside learned sink keys. Without a heuristic
    (base `Constant`) and `scaled=False` the scores are the published gate's, those of `FastKVzip`
    for the same weights.

    Args:
        base: the heuristic; see `Residual`.
        num_layers: layers of the model; 0 until `train.py` fills in this and the other sizes of the model.
        num_heads: kv heads per layer.
        hidden_size: E of the model.
        num_groups: query heads per kv head.
        rank: dimensions of query and key.
        sinks: learned keys per head.
        scaled: multiply the gate by a learned factor per head, 0 at first; else the correction is the gate itself,
            and a policy at initialisation does not keep what the heuristic keeps.
    """

    def __init__(
        self,
        base: Scorer,
        num_layers: int = 0,
        num_heads: int = 0,
        hidden_size: int = 0,
        num_groups: int = 0,
        rank: int = 8,
        sinks: int = 8,
        scaled: bool = True,
    ) -> None:
        super().__init__(base, num_layers, num_heads)
        if rank < 1 or sinks < 1:
            raise UserError(f"rank={rank} sinks={sinks}: expected at least 1 of each")
        if num_heads and not num_groups:
            raise UserError("num_groups=0: expected the query heads per kv head, as the other sizes are given")
        self._caches_features(hidden=True)
        sizes = (num_heads, num_groups, hidden_size, rank, sinks)
        first = initial_gate(lambda *shape: torch.randn(num_layers, *shape, dtype=torch.float32), *sizes)
        self.gate = nn.ParameterDict({name.replace(".", "_"): nn.Parameter(weight) for name, weight in first.items()})
        self._names = tuple(first)
        self.scale = nn.Parameter(torch.zeros(num_layers, num_heads, 1, dtype=torch.float32)) if scaled else None

    def correction(self, obs: Observation, baseline: Tensor) -> Tensor:
        return self.cached_features(obs).squeeze(-1)

    def token_features(self, obs: Observation) -> Tensor:
        """The correction itself, [B, H, S, 1]."""
        assert obs.hidden is not None
        weights = {name: self.gate[name.replace(".", "_")][obs.layer_idx] for name in self._names}
        gate = gate_scores(weights, obs.hidden.float())
        return (gate if self.scale is None else self.scale[obs.layer_idx] * gate).unsqueeze(-1)


def initial_gate(
    draw: Callable[..., Tensor], heads: int, group: int, width: int, features: int, sinks: int
) -> dict[str, Tensor]:
    """Initial weights of a gate; `draw` may put batch dimensions before the shape that it is given."""
    scale, queries = max(1, width) ** -0.5, heads * group * features
    query = draw(queries, width) * scale
    key = draw(heads * features, width) * scale
    before = query.shape[:-2]
    return {
        "q_proj.weight": query,
        "q_proj.bias": query.new_zeros(*before, queries),
        "k_proj.weight": key,
        "q_norm.weight": query.new_ones(*before, features),
        "k_norm.weight": query.new_ones(*before, features),
        "k_base": draw(heads, 1, sinks, features),
        "b": query.new_zeros(*before, heads, 1, group),
    }


def gate_scores(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Fast KVzip's scores [B, H, S] from hidden states [B, S, E] and the weights of one layer; differentiable.

    score_j = mean over the query heads of a kv head of 1 / (1 + sum_s exp(e_s - l)), with q = norm(W_q x_j + b_q),
    k = norm(W_k x_j), l = q k / sqrt(F) + b, and e_s = q k_s / sqrt(F) for learned base keys k_s: the weight of the
    token's own key beside theirs. x_j is the input of the layer's attention; no other token is read.
    """
    heads, _, _, features = weights["k_base"].shape
    query = F.linear(hidden, weights["q_proj.weight"], weights["q_proj.bias"]).unflatten(-1, (heads, -1, features))
    query = F.rms_norm(query, (features,), weights["q_norm.weight"], eps=1e-6)  # [B, S, H, G, F]
    key = F.linear(hidden, weights["k_proj.weight"]).unflatten(-1, (heads, features))
    key = F.rms_norm(key, (features,), weights["k_norm.weight"], eps=1e-6)  # [B, S, H, F]
    own = torch.einsum("bshgf,bshf->bshg", query, key) * features**-0.5 + weights["b"].squeeze(1)
    others = torch.einsum("bshgf,hnf->bshgn", query, weights["k_base"].squeeze(1)) * features**-0.5
    return (own - others.logsumexp(-1)).sigmoid().mean(-1).transpose(1, 2)
