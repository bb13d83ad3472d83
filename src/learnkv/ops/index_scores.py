"""Scores of an indexer: small queries and one small key per token, for all heads of a layer."""

from collections.abc import Mapping
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["relu", "silu", "none"]
ACTIVATIONS = get_args(Activation)


def index_keys(weights: Mapping[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, S, F] and the gates [B, S, I] that a token has as a query, from hidden states [B, S, E]."""
    key = F.rms_norm(F.linear(hidden, weights["key.weight"]), weights["k_norm.weight"].shape, weights["k_norm.weight"])
    index_heads, features = len(weights["gate.weight"]), key.shape[-1]
    return key, F.linear(hidden, weights["gate.weight"]) * (index_heads * features) ** -0.5


def index_scores(
    weights: Mapping[str, Tensor], queries: Tensor, gates: Tensor, keys: Tensor, activation: Activation = "relu"
) -> Tensor:
    """A_st = sum_i gate_si act(q_si k_t) [B, T, S], with q = norm(U q_s) of I index heads.

    Args:
        weights: of one layer.
        queries: [B, N, T, D] of all query heads before RoPE.
        gates: [B, T, I] of the tokens of these queries.
        keys: [B, S, F].
        activation: of the products.
    """
    features = keys.shape[-1]
    joined = queries.transpose(1, 2).flatten(2)  # [B, T, N*D]
    small = F.linear(joined, weights["query.weight"]).unflatten(-1, (-1, features))
    small = F.rms_norm(small, (features,), weights["q_norm.weight"])
    products = torch.einsum("btif,bsf->btis", small, keys)
    if activation != "none":
        products = products.relu() if activation == "relu" else F.silu(products)
    return torch.einsum("bti,btis->bts", gates, products)
