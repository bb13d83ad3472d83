"""Attention weights of the last prompt queries over all cache entries."""

import torch
from torch import Tensor


def window_attention(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
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
        lse: [B, H*G, W] log-sum-exp of every query's masked scaled products; None: computed.
    """
    logits, mask = window_logits(
        queries, keys, query_positions=query_positions, positions=positions, valid=valid, scaling=scaling
    )
    lse = logits.logsumexp(-1) if lse is None else lse.view(logits.shape[:-1])
    # A query that attends to nothing has weights of 0.
    return logits.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_(), mask


def window_logits(
    queries: Tensor, keys: Tensor, *, query_positions: Tensor, positions: Tensor, valid: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scaled products [B, H, G, W, S] in float32 or better, -inf where masked, and the mask [B, H, W, S].

    Arguments as in `window_attention`.
    """
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(keys.dtype, torch.float32)
    grouped = queries.to(exact).unflatten(1, (keys.shape[1], -1))  # [B, H, G, W, D]
    products = grouped.flatten(2, 3) @ keys.to(exact).transpose(-1, -2)  # einsum would copy strided keys
    logits = products.mul_(scaling).unflatten(2, grouped.shape[2:4])
    own = query_positions[:, None, :, None]
    mask = (positions.unsqueeze(2) <= own) & (own >= 0) & valid.unsqueeze(2)
    return logits.masked_fill_(~mask.unsqueeze(2), -torch.inf), mask


def in_window(query_positions: Tensor, positions: Tensor) -> Tensor:
    """Mask [B, H, S] of the entries at or after the first query of the window [B, W]."""
    first = query_positions.masked_fill(query_positions < 0, torch.iinfo(query_positions.dtype).max).amin(-1)
    return positions >= first[:, None, None]
