"""Column sums and maxima of attention in plain PyTorch, a block of queries at a time."""

import torch
from torch import Tensor

from learnkv.ops.softmax_terms import SoftmaxTerms, softmax

_BLOCK = 2**22  # attention weights in memory at once: 16 MiB on a CPU, whose caches are small,
_FACTOR = 16  # and this many times more on other devices, where small blocks would cost launches only


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
    total = queries.new_zeros(batch, heads, queries.shape[1] // heads, entries, dtype=torch.float32)
    keys = keys.float()
    block_size = _BLOCK * (1 if keys.device.type == "cpu" else _FACTOR)
    sinks = terms.of_heads(heads)
    sinks = None if sinks is None else sinks.unsqueeze(-1)  # [H, G, 1, 1]
    step = max(block_size // max(total.numel(), 1), 1)
    for begin in range(0, queries.shape[2], step):
        block = slice(begin, begin + step)
        own = query_positions[:, None, block, None]
        mask = (positions.unsqueeze(2) <= own) & (own >= 0) & valid.unsqueeze(2)
        hidden = ~mask.unsqueeze(2)  # [B, H, 1, block, S]
        grouped = queries[:, :, block].float().unflatten(1, (heads, -1))
        logits = terms.capped(torch.einsum("bhgwd,bhsd->bhgws", grouped, keys).mul_(scaling))
        # The second fill is for queries that attend to nothing, whose softmax is 0/0.
        weights = softmax(logits.masked_fill_(hidden, -torch.inf), sinks).masked_fill_(hidden, 0.0)
        if query_weight is not None:
            weights = weights * query_weight[:, None, None, block, None]
        total = total + weights.sum(3) if reduce == "sum" else torch.maximum(total, weights.amax(3))
    return total
