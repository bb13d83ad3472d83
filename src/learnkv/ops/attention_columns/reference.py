"""Column sums and maxima of attention in plain PyTorch, a block of queries at a time."""

import torch
from torch import Tensor

_BLOCK = 2**22  # attention weights held at once: 16 MiB of them on a CPU, whose caches are small,
_TIMES = 16  # and so many times more on other devices, where a block of few queries would be all launches


def attention_columns(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    reduce: str,
    query_weight: Tensor | None,
) -> Tensor:
    batch, heads, entries, _ = keys.shape
    total = queries.new_zeros(batch, heads, queries.shape[1] // heads, entries, dtype=torch.float32)
    keys = keys.float()
    at_once = _BLOCK * (1 if keys.device.type == "cpu" else _TIMES)
    step = max(at_once // max(total.numel(), 1), 1)
    for begin in range(0, queries.shape[2], step):
        block = slice(begin, begin + step)
        at = query_positions[:, block, None]
        seen = (positions.unsqueeze(2) <= at.unsqueeze(1)) & (at.unsqueeze(1) >= 0) & valid.unsqueeze(2)
        unseen = ~seen.unsqueeze(2)  # [B, H, 1, block, S]
        grouped = queries[:, :, block].float().unflatten(1, (heads, -1))
        logits = torch.einsum("bhgwd,bhsd->bhgws", grouped, keys).mul_(scaling)
        # The second fill is for queries that see nothing, whose softmax is 0/0.
        weights = logits.masked_fill_(unseen, -torch.inf).softmax(-1).masked_fill_(unseen, 0.0)
        if query_weight is not None:
            weights = weights * query_weight[:, None, None, block, None]
        total = total + weights.sum(3) if reduce == "sum" else torch.maximum(total, weights.amax(3))
    return total
