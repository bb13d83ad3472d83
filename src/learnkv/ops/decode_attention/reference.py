"""Ragged decode attention by padding each row to the longest; softmax in float32."""

import torch
from torch import Tensor

from learnkv.ops.tail_slots import tail_slots


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
    pages: Tensor | None,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    if pages is not None:
        pools, tails = (keys, values), (tail_keys, tail_values)
        return _read_pages(query, pools, start, length, tails, tail_mask, scaling, tail_length, pages, page_size)
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


def _read_pages(
    query: Tensor,
    pools: tuple[Tensor, Tensor],
    start: Tensor,
    length: Tensor,
    tails: tuple[Tensor, Tensor],
    tail_mask: Tensor | None,
    scaling: float,
    tail_length: Tensor | None,
    pages: Tensor,
    page_size: int,
) -> tuple[Tensor, Tensor]:
    """Attention of one token to the entries of the pages, each list [B*P] read by G or, of its own, one query head."""
    batch, heads, tail, dim = tails[0].shape
    exact = torch.promote_types(query.dtype, torch.float32)
    lists = pages.shape[0]
    row = torch.arange(lists, device=query.device) // (lists // (batch * heads))  # kv row of every list
    seen = query.new_ones(1, tail, dtype=torch.bool) if tail_mask is None else tail_mask[:, 0, 0]
    order, said = tail_slots(seen.expand(batch, tail), tail_length)

    entry = (pages.unsqueeze(-1) * page_size + torch.arange(page_size, device=query.device)).flatten(1).long()
    kept = length[row].unsqueeze(-1)
    there = (entry >= 0) & (entry < kept + said[row // heads].unsqueeze(-1))
    recent = entry >= kept
    slot = order[row // heads].gather(1, (entry - kept).clamp(0, tail - 1)) + row.unsqueeze(-1) * tail
    place = (start[row].unsqueeze(-1) + entry).clamp(0, max(len(pools[0]) - 1, 0))

    def read(pool: Tensor, tail_part: Tensor) -> Tensor:
        new = tail_part.reshape(-1, dim)[slot]
        return torch.where(recent.unsqueeze(-1), new, pool[place]) if len(pool) else new

    keys, values = (read(*both) for both in zip(pools, tails, strict=True))
    logits = (query.view(lists, -1, dim) @ keys.transpose(-1, -2)).to(exact) * scaling
    logits = logits.masked_fill(~there.unsqueeze(1), float("-inf"))
    lse = logits.logsumexp(-1, keepdim=True)
    weight = (logits - lse.masked_fill(lse == float("-inf"), 0)).exp().to(query.dtype)
    output = weight @ values.masked_fill(~there.unsqueeze(-1), 0)
    return output.view(query.shape), lse.view(query.shape[:3])


def causal_tail(new: int, tail: int, device: torch.device, tail_length: Tensor | None = None) -> Tensor:
    """[1, 1, new, tail] True where the i-th of the last `new` slots in use may look."""
    slot = torch.arange(tail, device=device)
    asking = torch.arange(new, device=device) - new + (tail if tail_length is None else tail_length)
    return (slot <= asking.unsqueeze(-1)).view(1, 1, new, tail)
