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
    exact = torch.promote_types(keys.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by
    grouped = queries.to(exact).unflatten(1, (keys.shape[1], -1))  # [B, H, G, W, D]
    logits = scaling * torch.einsum("bhgwd,bhsd->bhgws", grouped, keys.to(exact))
    asks = query_positions >= 0  # [B, W]
    sees = positions.unsqueeze(2) <= query_positions[:, None, :, None]
    sees = sees & asks[:, None, :, None] & valid.unsqueeze(2)
    unseen = ~sees.unsqueeze(2)
    logits = logits.masked_fill(unseen, -torch.inf)
    weights = logits.softmax(-1) if lse is None else (logits - lse.view(logits.shape[:-1]).unsqueeze(-1)).exp()
    # The second fill is for queries that see nothing, whose softmax is 0/0.
    return weights.masked_fill(unseen, 0.0), sees


def in_window(query_positions: Tensor, positions: Tensor) -> Tensor:
    """Which entries [B, H, S] came with the queries of the window [B, W] or after them."""
    first = query_positions.masked_fill(query_positions < 0, torch.iinfo(query_positions.dtype).max).amin(-1)
    return positions >= first[:, None, None]
