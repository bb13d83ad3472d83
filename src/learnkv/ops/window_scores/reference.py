"""Window scores in plain PyTorch: one pass over the keys for small problems, else two passes over parts of them.

No tensor has the size of heads x window x slots.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from learnkv.ops.pool_apart import Pooling, pool_apart
from learnkv.ops.reduce_group import GroupReduce, reduce_group
from learnkv.ops.softmax_terms import SoftmaxTerms, with_sinks
from learnkv.ops.window_attention import in_window, window_attention, window_logits

_FEW = 2**18
"""Weights in memory at once: a megabyte, which fits into the cache of a core."""
_SHORTEST = 128
"""Smallest number of slots per part; for long prompts it is as many as make two numbers per entry of a head."""


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
    group_reduce: GroupReduce | Literal["none"],
    group_first: bool,
    terms: SoftmaxTerms,
    lse: Tensor | None,
) -> Tensor:
    """`window_scores` in PyTorch."""
    per_head, slots = queries.shape[1] // keys.shape[1] * queries.shape[2], keys.shape[2]
    once = per_head * keys.shape[:3].numel() <= _FEW
    step = max(_SHORTEST, slots if once else 2 * slots // max(per_head, 1))
    parts: list[dict[str, Any]] = [
        dict(zip(("keys", "positions", "valid"), part, strict=True))
        for part in zip(keys.split(step, 2), positions.split(step, 2), valid.split(step, 2), strict=True)
    ]
    same: dict[str, Any] = {"queries": queries.contiguous(), "query_positions": query_positions}
    same |= {"scaling": scaling, "terms": terms}
    if lse is None and not once:
        sums = [window_logits(**same, **part)[0].logsumexp(-1) for part in parts]
        lse = with_sinks(torch.stack(sums, -1).logsumexp(-1), terms.of_heads(keys.shape[1]))

    queries_of_row = (query_positions >= 0).sum(-1).clamp(min=1)[:, None, None]
    read = []
    for part in parts:
        weights, mask = window_attention(**same, **part, lse=lse)
        queries_of_entry = mask.sum(2).clamp(min=1)
        # Exactly 1 for the past: its sums stay bit-identical, as their ties are part of the published methods.
        attention = weights.sum(3) * (queries_of_row.float() / queries_of_entry).unsqueeze(2)
        if window_reduce == "mean":
            attention = attention / queries_of_row.unsqueeze(2)
        if group_reduce != "none" and group_first:
            attention = reduce_group(attention, group_reduce)
        read.append(attention)
    attention = torch.cat(read, -1)  # [B, H, S], or [B, H, G, S] of every query head
    inside = in_window(query_positions, positions)
    if attention.dim() == 3:
        return pool_apart(attention, inside, valid, kernel_size, pooling)
    pooled = pool_apart(attention, inside.unsqueeze(2), valid.unsqueeze(2), kernel_size, pooling)
    return pooled if group_reduce == "none" else reduce_group(pooled, group_reduce)
