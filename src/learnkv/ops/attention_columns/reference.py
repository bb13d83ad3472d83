"""Column sums and maxima of attention in plain PyTorch, a block of queries at a time."""

import torch
from torch import Tensor

from learnkv.ops.softmax_terms import SoftmaxTerms, softmax

_BLOCK = 2**19  # attention weights in memory at once: 2 MiB on a CPU, whose caches are small, one kv head at a time,
_FACTOR = 128  # and this many times more on other devices, where small blocks would cost launches only


def attention_columns(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    terms: SoftmaxTerms,
    reduce: str,
    query_weight: Tensor | None,
) -> Tensor:
    """`attention_columns` in PyTorch."""
    batch, heads, entries, _ = keys.shape
    group = queries.shape[1] // heads
    grouped = queries.unflatten(1, (heads, group))
    total = queries.new_zeros(batch, heads, group, entries, dtype=torch.float32)
    sinks = terms.of_heads(heads)  # [H, G, 1]
    if not _by_head(total):
        _add(total, grouped, keys, query_positions, positions, valid, scaling, terms, sinks, reduce, query_weight)
        return total
    for b in range(batch):
        row = slice(b, b + 1)
        weight = None if query_weight is None else query_weight[row]
        for h in range(heads):
            head = slice(h, h + 1)
            own_sinks = None if sinks is None else sinks[head]
            entry = keys[row, head], positions[row, head], valid[row, head]
            there = torch.from_numpy(entry[-1][0, 0].numpy().nonzero()[0])
            columns = total.new_zeros(1, 1, group, len(there))
            if len(there) < entries:
                own_keys, own_positions, own_valid = (part.index_select(2, there) for part in entry)
            else:
                own_keys, own_positions, own_valid = entry
            about = (grouped[row, head], own_keys, query_positions[row], own_positions, own_valid)
            _add(columns, *about, scaling, terms, own_sinks, reduce, weight)
            total[row, head].index_copy_(3, there, columns)
    return total


def _by_head(total: Tensor) -> bool:
    """Whether kv heads are computed one after the other, where calls are cheap and the host may look at tables."""
    return total.is_cpu


def _add(
    total: Tensor,
    grouped: Tensor,
    keys: Tensor,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    terms: SoftmaxTerms,
    sinks: Tensor | None,
    reduce: str,
    query_weight: Tensor | None,
) -> None:
    """Add columns to `total` [B, H, G, S] of the queries [B, H, G, T, D], for some rows and heads."""
    transposed = keys.float().flatten(0, 1).transpose(1, 2)
    sinks = None if sinks is None else sinks.unsqueeze(-1)
    size = _BLOCK * (1 if total.is_cpu else _FACTOR)
    step = max(size // max(total.numel(), 1), 1)
    ascending = total.shape[:2] == (1, 1) and _ascending(positions, valid)
    for begin in range(0, grouped.shape[3], step):
        block = slice(begin, begin + step)
        own, query = query_positions[:, block], grouped[:, :, :, block].float()
        seen, reached = _reach(own, positions) if ascending else (0, positions.shape[2])
        flat = query.flatten(2, 3).flatten(0, 1)
        logits = torch.baddbmm(query.new_empty(()), flat, transposed[..., :reached], beta=0, alpha=scaling)
        logits = terms.capped(logits).view(*query.shape[:-1], reached)
        hidden, later = None, slice(seen, reached)
        if seen < reached:
            asking = own[:, None, :, None]
            mask = (positions[:, :, None, later] <= asking) & (asking >= 0) & valid[:, :, None, later]
            hidden = ~mask.unsqueeze(2)  # [B, H, 1, block, S']
            logits[..., later].masked_fill_(hidden, -torch.inf)
        weights = softmax(logits, sinks)
        if hidden is not None:  # again, for queries that attend to nothing, whose softmax is 0/0
            weights[..., later].masked_fill_(hidden, 0.0)
        if query_weight is not None:
            weights = weights * query_weight[:, None, None, block, None]
        reachable = total[..., :reached]
        if reduce == "sum":
            reachable += weights.sum(3)
        else:
            torch.maximum(reachable, weights.amax(3), out=reachable)


def _ascending(positions: Tensor, valid: Tensor) -> bool:
    """Whether the entries of one head are in order and all valid, on a CPU: then few of them need a mask."""
    if not positions.is_cpu:
        return False
    row = positions[0, 0].numpy()
    return bool(valid.numpy().all()) and not bool((row[1:] < row[:-1]).any())


def _reach(own: Tensor, positions: Tensor) -> tuple[int, int]:
    """Leading entries that every query at `own` [1, T] attends to, and those that any does; positions ascend."""
    asking = own.numpy()
    seen, reached = positions[0, 0].numpy().searchsorted([asking.min(), asking.max()], side="right").tolist()
    return seen if asking.min() >= 0 else 0, reached
