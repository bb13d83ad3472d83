"""Attention to entries that fade, each at its own rate; for training gates of retention."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms, softmax
from learnkv.ops.window_attention import window_logits


def retention_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    log_retention: Tensor,
    scaling: float,
    on: Literal["weight", "logit"] = "weight",
    terms: SoftmaxTerms = NO_TERMS,
) -> Tensor:
    """Causal attention of T queries to T entries, of which entry j has faded by beta_j^(i - j) for query i.

    The paper (arXiv 2605.09649) multiplies weights before they are normalised, softmax(z_ij + (i - j) log beta_j); the
    published code has a reference that multiplies logits, softmax(z_ij beta_j^(i - j)), and no training code.

    Args:
        queries: [B, H*G, T, D] after RoPE.
        keys, values: [B, H, T, D].
        log_retention: [B, H, T] log beta, at most 0; only this has a gradient.
        scaling: factor on query-key products.
        on: what is multiplied.
        terms: soft cap, of what is multiplied, and sinks, which do not fade.

    Returns:
        [B, H*G, T, D] float32, or float64 from such inputs.
    """
    batch, heads, slots, _ = keys.shape
    place = torch.arange(slots, device=keys.device)
    with torch.no_grad():
        logits, mask = window_logits(
            queries,
            keys,
            query_positions=place.expand(batch, -1),
            positions=place.expand(batch, heads, -1),
            valid=torch.ones(batch, heads, slots, dtype=torch.bool, device=keys.device),
            scaling=scaling,
            terms=terms,
        )  # [B, H, G, T, T] and [B, H, T, T]
    age = (place.unsqueeze(-1) - place).clamp(min=0)
    fading = (log_retention.unsqueeze(2) * age).unsqueeze(2)  # [B, H, 1, T, T]
    visible = mask.unsqueeze(2)
    logits = logits.masked_fill(~visible, 0.0)
    faded = logits + fading if on == "weight" else logits * fading.exp()
    sinks = terms.of_heads(heads)
    faded = faded.masked_fill(~visible, -torch.inf)
    weights = softmax(faded, None if sinks is None else sinks.unsqueeze(-1))
    return (weights @ values.to(weights.dtype).unsqueeze(2)).flatten(1, 2)
