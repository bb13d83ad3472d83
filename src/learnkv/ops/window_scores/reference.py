"""Window scores in plain PyTorch."""

from torch import Tensor

from learnkv.ops.pool_apart import Pooling, pool_apart
from learnkv.ops.window_attention import in_window, window_attention


def window_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    kernel_size: int,
    pooling: Pooling,
    window_reduce: str,
    group_reduce: str,
    group_first: bool,
    lse: Tensor | None,
) -> Tensor:
    weights, seen = window_attention(
        queries, keys, query_positions=query_positions, positions=positions, valid=valid, scaling=scaling, lse=lse
    )
    asks = query_positions >= 0  # [B, W]
    queries_of_row = asks.sum(-1).clamp(min=1)[:, None, None]
    queries_of_entry = seen.sum(2).clamp(min=1)  # [B, H, S]
    # Exactly 1 for the past, whose sums must not be touched: its ties are part of the published methods.
    attention = weights.sum(3) * (queries_of_row / queries_of_entry).unsqueeze(2)  # [B, H, G, S]
    if window_reduce == "mean":
        attention = attention / queries_of_row.unsqueeze(2)
    inside = in_window(query_positions, positions)
    if group_first:
        attention = _reduce(attention, group_reduce)
        return pool_apart(attention, inside, valid, kernel_size, pooling)
    return _reduce(pool_apart(attention, inside.unsqueeze(2), valid.unsqueeze(2), kernel_size, pooling), group_reduce)


def _reduce(attention: Tensor, how: str) -> Tensor:
    """[B, H, G, S] to [B, H, S]."""
    if how == "max":
        return attention.amax(2)
    return attention.mean(2) if how == "mean" else attention.sum(2)
