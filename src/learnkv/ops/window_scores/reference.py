"""Window scores in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def window_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    kernel_size: int,
    pooling: str,
    window_reduce: str,
    group_reduce: str,
    group_first: bool,
    lse: Tensor | None,
) -> Tensor:
    exact = torch.promote_types(keys.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by
    grouped = queries.to(exact).unflatten(1, (keys.shape[1], -1))  # [B, H, G, W, D]
    logits = scaling * torch.einsum("bhgwd,bhsd->bhgws", grouped, keys.to(exact))

    asks = query_positions >= 0  # [B, W]
    seen = positions.unsqueeze(2) <= query_positions[:, None, :, None]
    seen = seen & asks[:, None, :, None] & valid.unsqueeze(2)  # [B, H, W, S]
    unseen = ~seen.unsqueeze(2)
    logits = logits.masked_fill(unseen, -torch.inf)
    # The second fill is for queries that see nothing, whose softmax is 0/0.
    weights = logits.softmax(-1) if lse is None else (logits - lse.view(logits.shape[:-1]).unsqueeze(-1)).exp()
    weights = weights.masked_fill(unseen, 0.0)

    queries_of_row = asks.sum(-1).clamp(min=1)[:, None, None]
    queries_of_entry = seen.sum(2).clamp(min=1)  # [B, H, S]
    # Exactly 1 for the past, whose sums must not be touched: its ties are part of the published methods.
    attention = weights.sum(3) * (queries_of_row / queries_of_entry).unsqueeze(2)  # [B, H, G, S]
    if window_reduce == "mean":
        attention = attention / queries_of_row.unsqueeze(2)

    window_start = query_positions.masked_fill(~asks, torch.iinfo(query_positions.dtype).max).amin(-1)
    inside = positions >= window_start[:, None, None]  # [B, H, S]
    if group_first:
        attention = _reduce(attention, group_reduce)
        return _pool_apart(attention, inside, valid, kernel_size, pooling)
    return _reduce(_pool_apart(attention, inside.unsqueeze(2), valid.unsqueeze(2), kernel_size, pooling), group_reduce)


def _reduce(attention: Tensor, how: str) -> Tensor:
    """[B, H, G, S] to [B, H, S]."""
    if how == "max":
        return attention.amax(2)
    return attention.mean(2) if how == "mean" else attention.sum(2)


def _pool_apart(attention: Tensor, inside: Tensor, valid: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Past and window pooled each for itself, as if the other were not there."""
    past = _pool(attention, valid & ~inside, kernel_size, pooling)
    window = _pool(attention, valid & inside, kernel_size, pooling)
    return torch.where(inside, window, past).masked_fill(~valid, 0.0)


def _pool(attention: Tensor, among: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """Pooled over neighbouring slots, of which only those `among` exist."""
    rows, slots = attention.flatten(0, -2), attention.shape[-1]
    among = among.expand_as(attention).reshape(-1, slots)
    padding = kernel_size // 2
    if pooling == "max":
        pooled = F.max_pool1d(rows.masked_fill(~among, -torch.inf), kernel_size, stride=1, padding=padding)
    else:
        pooled = F.avg_pool1d(rows.masked_fill(~among, 0.0), kernel_size, stride=1, padding=padding)
    return pooled.view_as(attention)
