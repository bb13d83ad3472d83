"""How much attention each of the last prompt queries gives to every cache entry."""

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
    """Softmax weights [B, H, G, W, S] in float32 or better, and which query sees which entry [B, H, W, S].

    A query sees the valid entries at its own position and before; weights of the others are 0. A query that is padding
    sees nothing.

    Args:
        queries: [B, H*G, W, D] after RoPE; query heads h*G .. h*G+G-1 read kv head h.
        keys: [B, H, S, D] after RoPE.
        query_positions: [B, W] prompt position of each query, negative where it is padding.
        positions: [B, H, S] prompt position of each entry.
        valid: [B, H, S] bool, False where there is no entry.
        scaling: factor on query-key products.
        lse: [B, H*G, W] log-sum-exp of every query's scaled products with what it sees, where it is known.
    """
    logits, sees = window_logits(
        queries, keys, query_positions=query_positions, positions=positions, valid=valid, scaling=scaling
    )
    lse = logits.logsumexp(-1) if lse is None else lse.view(logits.shape[:-1])
    # A query that sees nothing has no softmax, and weights of 0.
    return logits.sub_(lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp_(), sees


def window_logits(
    queries: Tensor, keys: Tensor, *, query_positions: Tensor, positions: Tensor, valid: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """Scaled products [B, H, G, W, S] in float32 or better, -inf where a query does not see an entry, and where it does
    [B, H, W, S]; arguments as in `window_attention`."""
    exact = torch.promote_types(keys.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by
    grouped = queries.to(exact).unflatten(1, (keys.shape[1], -1))  # [B, H, G, W, D]
    products = grouped.flatten(2, 3) @ keys.to(exact).transpose(-1, -2)  # einsum would copy a stretch of the keys
    logits = products.mul_(scaling).unflatten(2, grouped.shape[2:4])
    asks = query_positions >= 0  # [B, W]
    sees = positions.unsqueeze(2) <= query_positions[:, None, :, None]
    sees = sees & asks[:, None, :, None] & valid.unsqueeze(2)
    return logits.masked_fill_(~sees.unsqueeze(2), -torch.inf), sees


def in_window(query_positions: Tensor, positions: Tensor) -> Tensor:
    """Which entries [B, H, S] came with the queries of the window [B, W] or after them."""
    first = query_positions.masked_fill(query_positions < 0, torch.iinfo(query_positions.dtype).max).amin(-1)
    return positions >= first[:, None, None]
