"""Ragged decode attention by padding each row to the longest; softmax in float32."""

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    longest: int,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    tail_length: Tensor | None,
) -> tuple[Tensor, Tensor]:
    batch, query_heads, new, dim = query.shape
    heads, tail = tail_keys.shape[1], tail_keys.shape[2]
    group = query_heads // heads
    exact = torch.promote_types(query.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by
    packed = query.reshape(batch, heads, group * new, dim)

    slot = torch.arange(longest, device=query.device)
    entry = (start.unsqueeze(-1) + slot).clamp_max(max(keys.shape[0] - 1, 0))
    shape = (batch, heads, longest, dim)
    kept_keys = keys.index_select(0, entry.flatten()).view(shape)
    kept_values = values.index_select(0, entry.flatten()).view(shape)
    absent = (slot >= length.unsqueeze(-1)).view(batch, heads, 1, longest)

    past = (packed @ kept_keys.transpose(-1, -2)).to(exact) * scaling
    past = past.masked_fill(absent, float("-inf"))
    recent = (packed @ tail_keys.transpose(-1, -2)).to(exact) * scaling
    seen = tail_mask if tail_mask is not None else causal_tail(new, tail, query.device, tail_length)
    if tail_length is not None:
        unused = torch.arange(tail, device=query.device) >= tail_length
        seen, tail_values = seen & ~unused, tail_values.masked_fill(unused.unsqueeze(-1), 0)
    recent = recent.view(batch, heads, group, new, tail).masked_fill(~seen.unsqueeze(2), float("-inf"))
    logits = torch.cat([past, recent.view(batch, heads, group * new, tail)], -1)
    lse = logits.logsumexp(-1, keepdim=True)
    weight = (logits - lse.masked_fill(lse == float("-inf"), 0)).exp().to(query.dtype)
    # A padded slot must not reach the output: 0 * NaN is NaN where the pool beyond a segment holds anything.
    kept_values = kept_values.masked_fill(absent.transpose(-1, -2), 0)
    output = weight[..., :longest] @ kept_values + weight[..., longest:] @ tail_values
    return output.view(batch, query_heads, new, dim), lse.view(batch, query_heads, new)


def causal_tail(new: int, tail: int, device: torch.device, tail_length: Tensor | None = None) -> Tensor:
    """[1, 1, new, tail] True where the i-th of the last `new` slots in use may look."""
    slot = torch.arange(tail, device=device)
    asking = torch.arange(new, device=device) - new + (tail if tail_length is None else tail_length)
    return (slot <= asking.unsqueeze(-1)).view(1, 1, new, tail)
