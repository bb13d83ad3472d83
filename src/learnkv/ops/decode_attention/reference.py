"""Ragged decode attention in plain PyTorch: rows are read in place, softmax in float32.

Rows of one length at equal distances are one strided view of the pool, any other row is a view of its own. So the bytes
read are the bytes kept, however unequal the heads are. Only rows so short that a call costs more than their bytes are
copied together.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.ops.arguments import Codes, Pages, Ragged, Tail, Tier
from learnkv.ops.basis import rotated
from learnkv.ops.device import upload
from learnkv.ops.quantize import Quantized, dequantize
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms, with_sinks
from learnkv.ops.tail_slots import tail_slots

_WORTH_A_CALL = 8192
"""Elements of keys; reading fewer takes less time than the calls for it (some 30 us on a CPU)."""


def decode_attention(
    query: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    pages: Pages | None,
    tiers: Sequence[Tier] = (),
    terms: SoftmaxTerms = NO_TERMS,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`decode_attention` in PyTorch: one softmax over segment and tail, merged with tiers and sinks."""
    if pages is not None:
        return _paged_attention(query, kept, tail, scaling, pages, terms)
    batch, query_heads, new, dim = query.shape
    rows = batch * tail.keys.shape[1]
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(query.dtype, torch.float32)
    packed = query.reshape(rows, -1, dim)
    logits = terms.capped(_products(packed, tail.keys.reshape(rows, -1, dim), scaling, exact))
    logits, tail_values = _masked(logits, tail, new)
    newest = _Newest(logits, tail_values.reshape(rows, -1, dim), tail.mask is not None)
    sinks = terms.of_rows(batch, tail.keys.shape[1], new)
    needs_sum = needs_lse or bool(tiers) or sinks is not None
    output, lse = _segment_attention(packed, kept, scaling, exact, terms, newest, needs_sum)
    for tier in tiers:
        assert lse is not None
        output, lse = _merged(output, lse, *_tier_attention(packed, tier, scaling, exact, terms))
    if sinks is not None:
        assert lse is not None
        alone, lse = lse, with_sinks(lse, sinks)
        output = (output * (alone - lse).exp()).to(output.dtype)
    return output.view(query.shape), None if lse is None else lse.view(batch, query_heads, new)


class _Newest(NamedTuple):
    """The tail, for the softmax that it shares with a segment."""

    logits: Tensor
    """[R, G*T, M], -inf where a token does not attend to a slot."""
    values: Tensor
    """[R, M, D]."""
    masked: bool
    """Whether a token may attend to nothing; else it attends to itself at least."""

    def rows(self, rows: slice | Tensor) -> "_Newest":
        """Some rows of the batch and heads."""
        return _Newest(self.logits[rows], self.values[rows], self.masked)


def _products(query: Tensor, keys: Tensor, scaling: float, exact: torch.dtype) -> Tensor:
    ignored = query.new_empty(())  # by beta=0
    return torch.baddbmm(ignored, query, keys.transpose(1, 2), beta=0, alpha=scaling).to(exact)


def _segment_attention(
    packed: Tensor,
    kept: Ragged,
    scaling: float,
    exact: torch.dtype,
    terms: SoftmaxTerms,
    newest: _Newest | None = None,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention [R, G*T, D] of packed queries to the segments and the newest, and its log-sum-exp [R, G*T, 1]."""
    spans, device, dim = kept.host_spans(), packed.device, packed.shape[-1]
    assert all(length <= kept.longest for _, length in spans)
    views = list(row_views(spans))
    tiny = [view for view in views if 0 < view[1] * view[4] * dim < _WORTH_A_CALL]
    short = [row for first, rows, *_ in tiny for row in range(first, first + rows)] if len(tiny) > 2 else []
    order: list[int] = []
    outputs, sums = [], []

    def attend(rows: slice | Tensor | None, keys: Tensor, values: Tensor, absent: Tensor | None = None) -> None:
        queries, new = (packed, newest) if rows is None else (packed[rows], newest and newest.rows(rows))
        if new is not None and absent is None and exact == packed.dtype and not torch.is_grad_enabled():
            logits = _joined(queries, keys, scaling, new, terms)
        else:
            logits = terms.capped(_products(queries, keys, scaling, exact))
            if absent is not None:
                logits = logits.masked_fill(absent.unsqueeze(1), float("-inf"))
            if new is not None:
                logits = torch.cat([logits, new.logits], -1)
        if needs_lse:
            sums.append(logits.logsumexp(-1, keepdim=True))
        outputs.append(_weighted(logits, values, new))

    for first, rows, *view in views:
        if first in short:
            continue
        every = slice(first, first + rows) if rows < len(spans) else None
        keys, values = (strided(pool, rows, *view) for pool in (kept.keys, kept.values))
        attend(every, keys, values)
        order += range(first, first + rows)
    if short:
        entry, absent = _padded_rows([spans[row] for row in short], device)
        keys, values = (
            pool.index_select(0, entry.flatten()).view(*entry.shape, dim) for pool in (kept.keys, kept.values)
        )
        attend(None if len(short) == len(spans) else upload(short, device), keys, values, absent)
        order += short
    output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    lse = (sums[0] if len(sums) == 1 else torch.cat(sums)) if needs_lse else None
    if order == sorted(order):
        return output, lse
    inverse = [place for _, place in sorted(zip(order, range(len(order)), strict=True))]
    back = upload(inverse, device)
    return output[back], None if lse is None else lse[back]


def _joined(queries: Tensor, keys: Tensor, scaling: float, newest: _Newest, terms: SoftmaxTerms) -> Tensor:
    """Logits of the entries and behind them those of the newest, [R, G*T, S + M], without a copy of the former."""
    entries, new = keys.shape[1], newest.logits.shape[-1]
    logits = queries.new_empty(*queries.shape[:2], entries + new)
    own, last = logits.split([entries, new], -1)
    torch.baddbmm(queries.new_empty(()), queries, keys.transpose(1, 2), beta=0, alpha=scaling, out=own)
    if terms.softcap is not None:
        own.copy_(terms.capped(own))
    last.copy_(newest.logits)
    return logits


def _weighted(logits: Tensor, values: Tensor, newest: _Newest | None) -> Tensor:
    """Values [R, S, D], and those of the newest behind them, weighted by the softmax of logits [R, G*T, S + M]."""
    weight = logits.softmax(-1)
    if newest is None:
        return torch.bmm(weight.to(values.dtype), values)
    if newest.masked:
        weight = weight.masked_fill((logits == float("-inf")).all(-1, keepdim=True), 0)
    own, new = weight.to(values.dtype).split([values.shape[1], newest.values.shape[1]], -1)
    return torch.bmm(own, values).add_(torch.bmm(new, newest.values))


def _tier_attention(
    packed: Tensor, tier: Tier, scaling: float, exact: torch.dtype, terms: SoftmaxTerms
) -> tuple[Tensor, Tensor]:
    """As `_segment_attention`, to the entries of a tier, which are decoded for it."""
    dim = packed.shape[-1]
    keys, values = (decoded(part, dim).to(packed.dtype) for part in (tier.keys, tier.values))
    rows = Ragged(keys, values, tier.offset.long(), tier.length.long(), tier.longest, tier.host_spans())
    output, lse = _segment_attention(rotated(packed, tier.key_basis), rows, scaling, exact, terms)
    assert lse is not None
    return rotated(output, None if tier.value_basis is None else tier.value_basis.mT), lse


def decoded(part: Codes | Tensor, dim: int) -> Tensor:
    """Vectors [N, dim] of a tier as they are stored, that is rotated."""
    if isinstance(part, Tensor):
        return part
    return dequantize(Quantized(part.codes, part.scale, part.zero), part.bits, dim, impl="reference")


def _merged(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to two sets of entries from that to each of them."""
    both = torch.logaddexp(lse, other_lse)
    floor = both.masked_fill(both == float("-inf"), 0)
    mixed = output * (lse - floor).exp() + other * (other_lse - floor).exp()
    return mixed.to(output.dtype), both


def _masked(logits: Tensor, tail: Tail, new: int) -> tuple[Tensor, Tensor]:
    """Logits [R, G*T, M] of the tail, -inf where a token does not attend to a slot, and the values to be weighted."""
    batch, heads, slots, _ = tail.keys.shape
    if new == 1 and tail.mask is None and tail.used is None:
        return logits, tail.values
    mask, values = tail.mask, tail.values
    if mask is None:
        mask = causal_tail(new, slots, logits.device, tail.used)
    if tail.used is not None:
        unused = torch.arange(slots, device=logits.device) >= tail.used
        # Slots that were never written may be NaN, and 0 * NaN is NaN.
        mask, values = mask & ~unused, values.masked_fill(unused.unsqueeze(-1), 0)
    grouped = logits.view(batch, heads, -1, new, slots)
    return grouped.masked_fill(~mask.unsqueeze(2), float("-inf")).view_as(logits), values


def row_views(spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int, int, int]]:
    """Groups of rows that are one strided view: first row, rows, offset, distance from row to row, length."""
    first = 0
    while first < len(spans):
        offset, length = spans[first]
        distance = max(spans[first + 1][0] - offset, 0) if first + 1 < len(spans) else 0
        rows = 1
        while first + rows < len(spans) and spans[first + rows] == (offset + rows * distance, length):
            rows += 1
        yield first, rows, offset, distance, length
        first += rows


def _padded_rows(spans: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of the pool [R, longest] of rows padded with their last entry, and which of them are padding."""
    offset, length = (upload(column, device).unsqueeze(-1) for column in zip(*spans, strict=True))
    slot = torch.arange(max(count for _, count in spans), device=device)
    return offset + torch.minimum(slot, length - 1), slot >= length


def strided(pool: Tensor, rows: int, offset: int, distance: int, length: int) -> Tensor:
    """[rows, length, D] of the pool [N, D], not copied."""
    entry, channel = pool.stride()
    return pool.as_strided(
        (rows, length, pool.shape[1]), (distance * entry, entry, channel), pool.storage_offset() + offset * entry
    )


def _paged_attention(
    query: Tensor, kept: Ragged, tail: Tail, scaling: float, pages: Pages, terms: SoftmaxTerms
) -> tuple[Tensor, Tensor]:
    """Attention of one token to the entries of the pages; each list is read by G query heads or by one."""
    batch, heads, slots, dim = tail.keys.shape
    exact = torch.promote_types(query.dtype, torch.float32)
    lists = pages.numbers.shape[0]
    row = torch.arange(lists, device=query.device) // (lists // (batch * heads))  # kv row of every list
    mask = query.new_ones(1, slots, dtype=torch.bool) if tail.mask is None else tail.mask[:, 0, 0]
    order, count = tail_slots(mask.expand(batch, slots), tail.used)

    entry = (pages.numbers.unsqueeze(-1) * pages.size + torch.arange(pages.size, device=query.device)).flatten(1).long()
    length = kept.length[row].unsqueeze(-1)
    valid = (entry >= 0) & (entry < length + count[row // heads].unsqueeze(-1))
    in_tail = (entry >= length).unsqueeze(-1)
    slot = order[row // heads].gather(1, (entry - length).clamp(0, slots - 1)) + row.unsqueeze(-1) * slots
    source = (kept.offset[row].unsqueeze(-1) + entry).clamp(0, max(len(kept.keys) - 1, 0))

    def read(pool: Tensor, tail_part: Tensor) -> Tensor:
        new = tail_part.reshape(-1, dim)[slot]
        return torch.where(in_tail, new, pool[source]) if len(pool) else new

    keys, values = read(kept.keys, tail.keys), read(kept.values, tail.values)
    logits = terms.capped((query.view(lists, -1, dim) @ keys.transpose(-1, -2)).to(exact) * scaling)
    logits = logits.masked_fill(~valid.unsqueeze(1), float("-inf"))
    sinks = None if terms.sinks is None else terms.sinks.expand(batch, -1).reshape(lists, -1, 1)
    lse = with_sinks(logits.logsumexp(-1, keepdim=True), sinks)
    weight = (logits - lse.masked_fill(lse == float("-inf"), 0)).exp().to(query.dtype)
    output = weight @ values.masked_fill(~valid.unsqueeze(-1), 0)
    return output.view(query.shape), lse.view(query.shape[:3])


def causal_tail(new: int, slots: int, device: torch.device, used: Tensor | None = None) -> Tensor:
    """[1, 1, new, slots] True where the i-th of the last `new` slots in use may attend."""
    slot = torch.arange(slots, device=device)
    own = torch.arange(new, device=device) - new + (slots if used is None else used)
    return (slot <= own.unsqueeze(-1)).view(1, 1, new, slots)
