"""Fast KVzip scores."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate
from learnkv.observation import Observation
from learnkv.scorers.base import Scorer


class FastKVzip(Scorer):
    """What a small trained gate makes of KVzip's score from a token's hidden state (Fast KVzip, arXiv 2601.17668).

    score_j = mean over the query heads of a kv head of 1 / (1 + sum_s exp(e_s - l)), with q = norm(W_q x_j + b_q),
    k = norm(W_k x_j), l = q k / sqrt(F) + b, and e_s = q k_s / sqrt(F) for learned base keys k_s: the weight of the
    token's own key beside theirs. x_j is the input of the layer's attention; no other token is looked at. Budgets
    follow one ranking of all layers and heads: the allocator `Flat`.

    In the published training code b is added twice, once where the gate is used.

    Args:
        gate: safetensors file with the gate of every layer, or `reference`.
        bias: how often b is added.
    """

    needs = frozenset({"hidden"})

    def __init__(self, gate: str = "reference", bias: Literal["once", "twice"] = "once") -> None:
        super().__init__()
        self.source = gate
        self.bias = bias
        self.weights = tensors.read(locate(gate, "kvzip_gate.safetensors"), tensors.KVZIP_GATE)

    def forward(self, seen: Observation) -> Tensor:
        assert seen.hidden is not None
        layers, heads, _, _ = self.weights["b"].shape
        made_for = (heads, self.weights["q_proj.weight"].shape[-1])
        have = (seen.keys.shape[1], seen.hidden.shape[-1])
        if seen.layer_idx >= layers or have != made_for:
            raise UserError(
                f"gate={self.source}: made for {layers} layers of {heads} kv heads and hidden size {made_for[1]}, "
                f"layer {seen.layer_idx} of the model has {have[0]} and {have[1]}; "
                "python -m learnkv.tables model=MODEL out=FOLDER makes its file"
            )
        weights = {name: one[seen.layer_idx].to(seen.hidden.device) for name, one in self.weights.items()}
        if self.bias == "twice":
            weights["b"] = 2 * weights["b"]
        return gate_scores(weights, seen.hidden.float())


def gate_scores(weights: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
    """Scores [B, H, S] from hidden states [B, S, E] and the weights of one layer; differentiable."""
    heads, _, _, features = weights["k_base"].shape
    query = F.linear(hidden, weights["q_proj.weight"], weights["q_proj.bias"]).unflatten(-1, (heads, -1, features))
    query = F.rms_norm(query, (features,), weights["q_norm.weight"], eps=1e-6)  # [B, S, H, G, F]
    key = F.linear(hidden, weights["k_proj.weight"]).unflatten(-1, (heads, features))
    key = F.rms_norm(key, (features,), weights["k_norm.weight"], eps=1e-6)  # [B, S, H, F]
    own = torch.einsum("bshgf,bshf->bshg", query, key) * features**-0.5 + weights["b"].squeeze(1)
    others = torch.einsum("bshgf,hnf->bshgn", query, weights["k_base"].squeeze(1)) * features**-0.5
    return (own - others.logsumexp(-1)).sigmoid().mean(-1).transpose(1, 2)
