"""Ragged decode attention in plain PyTorch: rows are read where they lie, softmax in float32.

Rows of one length that lie at equal distances are one strided view of the pool, any other row is a view of its own. So
the bytes read are the bytes kept, however unequal the heads are. Only rows so short that a call costs more than their
bytes are copied together.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from learnkv.ops.device import upload
from learnkv.ops.tail_slots import tail_slots

_WORTH_A_CALL = 8192
"""Elements of keys; reading fewer takes less time than the calls for it (some 30 us on a CPU)."""


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
    spans: Sequence[tuple[int, int]] | None,
) -> tuple[Tensor, Tensor]:
    if pages is not None:
        pools, tails = (keys, values), (tail_keys, tail_values)
        return _read_pages(query, pools, start, length, tails, tail_mask, scaling, tail_length, pages, page_size)
    batch, query_heads, new, dim = query.shape
    heads, tail = tail_keys.shape[1], tail_keys.shape[2]
    group = query_heads // heads
    exact = torch.promote_types(query.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by
    packed = query.reshape(batch * heads, group * new, dim)
    nothing = packed.new_zeros(())

    def products(asking: Tensor, asked: Tensor) -> Tensor:
        return torch.baddbmm(nothing, asking, asked.transpose(1, 2), beta=0, alpha=scaling).to(exact)

    spans = spans if spans is not None else list(zip(start.tolist(), length.tolist(), strict=True))
    assert all(count <= longest for _, count in spans)
    views = list(row_views(spans))
    tiny = [view for view in views if 0 < view[1] * view[4] * dim < _WORTH_A_CALL]
    short = [row for first, rows, *_ in tiny for row in range(first, first + rows)] if len(tiny) > 2 else []
    order: list[int] = []
    outputs, sums = [], []
    for first, rows, at, apart, count in views:
        if first in short:
            continue
        kept_keys, kept_values = (strided(pool, rows, at, apart, count) for pool in (keys, values))
        logits = products(packed[first : first + rows], kept_keys)
        sums.append(logits.logsumexp(-1, keepdim=True))
        outputs.append(logits.softmax(-1).to(query.dtype) @ kept_values)
        order += range(first, first + rows)
    if short:
        place, absent = _places([spans[row] for row in short], query.device)
        kept_keys, kept_values = (
            pool.index_select(0, place.flatten()).view(*place.shape, dim) for pool in (keys, values)
        )
        asking = packed if len(short) == len(spans) else packed[upload(short, query.device)]
        logits = products(asking, kept_keys).masked_fill(absent.unsqueeze(1), float("-inf"))
        sums.append(logits.logsumexp(-1, keepdim=True))
        outputs.append(logits.softmax(-1).to(query.dtype) @ kept_values)
        order += short
    past, past_lse = torch.cat(outputs), torch.cat(sums)
    if order != sorted(order):
        back = sorted(range(len(order)), key=order.__getitem__)
        past, past_lse = (part[upload(back, query.device)] for part in (past, past_lse))

    recent = products(packed, tail_keys.reshape(batch * heads, tail, dim))
    if new > 1 or tail_mask is not None or tail_length is not None:
        seen = tail_mask if tail_mask is not None else causal_tail(new, tail, query.device, tail_length)
        if tail_length is not None:
            unused = torch.arange(tail, device=query.device) >= tail_length
            # What was never written may be NaN, and 0 * NaN is NaN.
            seen, tail_values = seen & ~unused, tail_values.masked_fill(unused.unsqueeze(-1), 0)
        hidden = ~seen.unsqueeze(2)
        recent = recent.view(batch, heads, group, new, tail).masked_fill(hidden, float("-inf")).view_as(recent)
    lse = torch.logaddexp(past_lse, recent.logsumexp(-1, keepdim=True))
    floor = lse.masked_fill(lse == float("-inf"), 0)
    weight = (recent - floor).exp().to(query.dtype)
    output = past * (past_lse - floor).exp() + weight @ tail_values.reshape(batch * heads, tail, dim)
    return output.to(query.dtype).view(query.shape), lse.view(batch, query_heads, new)


def row_views(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, int, int]]:
    """First row, number of rows, where it starts, from row to row, and length of every group that is one view."""
    first = 0
    while first < len(spans):
        at, count = spans[first]
        apart = max(spans[first + 1][0] - at, 0) if first + 1 < len(spans) else 0
        rows = 1
        while first + rows < len(spans) and spans[first + rows] == (at + rows * apart, count):
            rows += 1
        yield first, rows, at, apart, count
        first += rows


def _places(spans: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of the pool [R, longest] of rows padded to the longest, with their last entry, and where they are."""
    start, length = (upload(column, device).unsqueeze(-1) for column in zip(*spans, strict=True))
    slot = torch.arange(max(count for _, count in spans), device=device)
    return start + torch.minimum(slot, length - 1), slot >= length


def strided(pool: Tensor, rows: int, at: int, apart: int, count: int) -> Tensor:
    """[rows, count, D] of the pool [N, D], not copied."""
    entry, channel = pool.stride()
    return pool.as_strided(
        (rows, count, pool.shape[1]), (apart * entry, entry, channel), pool.storage_offset() + at * entry
    )


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
