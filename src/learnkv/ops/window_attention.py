"""Attention weights of the last prompt queries over all cache entries."""

import torch
from torch import Tensor

from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms, with_sinks


def window_attention(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    terms: SoftmaxTerms = NO_TERMS,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax weights [B, H, G, W, S] in float32 or better, and the mask of which query attends to which entry.

    A query attends to the valid entries up to its own position; other weights are 0. Padding attends to nothing.

    Args:
        queries: [B, H*G, W, D] after RoPE; query heads h*G .. h*G+G-1 read kv head h.
        keys: [B, H, S, D] after RoPE.
        query_positions: [B, W] prompt position of each query, negative where it is padding.
        positions: [B, H, S] prompt position of each entry.
        valid: [B, H, S] bool, False where there is no entry.
        scaling: factor on query-key products.
        terms: soft cap and sinks of the model.
        lse: [B, H*G, W] log-sum-exp of every query's masked logits and its sink; None: computed.
    """
    logits, mask = window_logits(
        queries, keys, query_positions=query_positions, positions=positions, valid=valid, scaling=scaling, terms=terms
    )
    if lse is None:
        lse = with_sinks(logits.logsumexp(-1), terms.of_heads(keys.shape[1]))
    lse = lse.view(logits.shape[:-1])
    # A query that attends to nothing has weights of 0.
    return logits.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_(), mask


def window_logits(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    terms: SoftmaxTerms = NO_TERMS,
) -> tuple[Tensor, Tensor]:
    """Logits [B, H, G, W, S] in float32 or better, -inf where masked, and the mask [B, H, W, S].

    Arguments as in `window_attention`. Sinks are no logits of entries: they are not among the result.
    """
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(keys.dtype, torch.float32)
    grouped = queries.to(exact).unflatten(1, (keys.shape[1], -1))  # [B, H, G, W, D]
    products = grouped.flatten(2, 3) @ keys.to(exact).transpose(-1, -2)  # einsum would copy strided keys
    logits = terms.capped(products.mul_(scaling)).unflatten(2, grouped.shape[2:4])
    own = query_positions[:, None, :, None]
    mask = (positions.unsqueeze(2) <= own) & (own >= 0) & valid.unsqueeze(2)
    return logits.masked_fill_(~mask.unsqueeze(2), -torch.inf), mask


def in_window(query_positions: Tensor, positions: Tensor) -> Tensor:
    """Mask [B, H, S] of the entries at or after the first query of the window [B, W]."""
    first = query_positions.masked_fill(query_positions < 0, torch.iinfo(query_positions.dtype).max).amin(-1)
    return positions >= first[:, None, None]
