"""Window scores in plain PyTorch, stretch by stretch of the entries: heads x window x slots never exist at once."""

from typing import Any

import torch
from torch import Tensor

from learnkv.ops.pool_apart import Pooling, pool_apart
from learnkv.ops.window_attention import in_window, window_attention, window_logits

_SHORTEST = 128
"""Slots that are read at once in short prompts; in long ones as many as make two numbers per entry of a head."""


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
    asked = queries.shape[1] // keys.shape[1] * queries.shape[2]
    step = max(_SHORTEST, 2 * keys.shape[2] // max(asked, 1))
    parts: list[dict[str, Any]] = [
        {"keys": some, "positions": where, "valid": there}
        for some, where, there in zip(keys.split(step, 2), positions.split(step, 2), valid.split(step, 2), strict=True)
    ]
    same: dict[str, Any] = {"queries": queries.contiguous(), "query_positions": query_positions, "scaling": scaling}
    if lse is None:
        sums = [window_logits(**same, **part)[0].logsumexp(-1) for part in parts]
        lse = torch.stack(sums, -1).logsumexp(-1)

    queries_of_row = (query_positions >= 0).sum(-1).clamp(min=1)[:, None, None]
    read = []
    for part in parts:
        weights, seen = window_attention(**same, **part, lse=lse)
        queries_of_entry = seen.sum(2).clamp(min=1)
        # Exactly 1 for the past, whose sums must not be touched: its ties are part of the published methods.
        attention = weights.sum(3) * (queries_of_row / queries_of_entry).unsqueeze(2)
        if window_reduce == "mean":
            attention = attention / queries_of_row.unsqueeze(2)
        read.append(_reduce(attention, group_reduce) if group_first else attention)
    attention = torch.cat(read, -1)  # [B, H, S], or [B, H, G, S] where slots are pooled first
    inside = in_window(query_positions, positions)
    if group_first:
        return pool_apart(attention, inside, valid, kernel_size, pooling)
    return _reduce(pool_apart(attention, inside.unsqueeze(2), valid.unsqueeze(2), kernel_size, pooling), group_reduce)


def _reduce(attention: Tensor, how: str) -> Tensor:
    """[B, H, G, S] to [B, H, S]."""
    if how == "max":
        return attention.amax(2)
    return attention.mean(2) if how == "mean" else attention.sum(2)
