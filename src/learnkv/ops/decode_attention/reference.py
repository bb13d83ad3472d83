"""Ragged decode attention in plain PyTorch: rows are read in place, softmax in float32.

Rows of one length at equal distances are one strided view of the pool, any other row is a view of its own. So the bytes
read are the bytes kept, however unequal the heads are. Only rows so short that a call costs more than their bytes are
copied together.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.ops.arguments import Codes, Pages, Ragged, Tail, Tier
from learnkv.ops.basis import rotated
from learnkv.ops.device import upload
from learnkv.ops.fused_attention import fused_attention, is_available
from learnkv.ops.quantize import Quantized, dequantize
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms, with_sinks
from learnkv.ops.tail_slots import causal_tail, tail_slots

_Part = tuple[Tensor, Tensor | None]
"""Output [R, G*T, D] and log-sum-exp [R, G*T, 1] of some rows, None where it is not wanted."""

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
    """`decode_attention` in PyTorch: segment and tail in one softmax or fused apart, merged with tiers and sinks."""
    if pages is not None:
        return _paged_attention(query, kept, tail, scaling, pages, terms)
    batch, query_heads, new, dim = query.shape
    heads = tail.keys.shape[1]
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(query.dtype, torch.float32)
    packed = query.reshape(batch * heads, -1, dim)
    sinks = terms.of_rows(batch, heads, new)
    needs_sum = needs_lse or bool(tiers) or sinks is not None
    if new == 1 and tail.mask is None and tail.used is None and _is_fused(query, terms):
        output, lse = _fused_attention(query, kept, tail, scaling, needs_sum)
    else:
        newest = _Newest.of(tail, new)
        output, lse = _segment_attention(packed, kept, scaling, exact, terms, newest, needs_sum)
    for tier in tiers:
        assert lse is not None
        output, lse = _merged(output, lse, *_tier_attention(packed, tier, scaling, exact, terms))
    if sinks is not None:
        assert lse is not None
        alone, lse = lse, with_sinks(lse, sinks)
        output = (output * (alone - lse).exp()).to(output.dtype)
    return output.reshape(query.shape), None if lse is None else lse.reshape(batch, query_heads, new)


def _is_fused(query: Tensor, terms: SoftmaxTerms) -> bool:
    return terms.softcap is None and is_available(query)


def _fused_attention(query: Tensor, kept: Ragged, tail: Tail, scaling: float, needs_lse: bool) -> _Part:
    """Attention of one token [B, H*G, 1, D] to the segments and to the whole tail, in few operations."""
    batch, heads, _, dim = tail.keys.shape
    grouped, views = query.reshape(batch, heads, -1, dim), kept.host_spans().views
    if len(views) == 1 and views[0].length:
        keys, values = (views[0].of_heads(pool, heads) for pool in (kept.keys, kept.values))
        output, lse = fused_attention(grouped, keys, values, scaling)
    else:
        exact = torch.promote_types(query.dtype, torch.float32)
        rows, sums = _segment_attention(grouped.flatten(0, 1), kept, scaling, exact, NO_TERMS)
        assert sums is not None
        output, lse = rows.view(grouped.shape), sums.view(grouped.shape[:3])
    newest, newest_lse = fused_attention(grouped, tail.keys, tail.values, scaling)
    # Every token attends to itself, so only the log-sum-exp of the segment may be -inf.
    share = (newest_lse - lse).sigmoid_().unsqueeze(-1).to(output.dtype)
    output = torch.lerp(output, newest, share).reshape(batch * heads, -1, dim)
    return output, torch.logaddexp(lse, newest_lse).reshape(batch * heads, -1, 1) if needs_lse else None


class _Newest(NamedTuple):
    """The tail, for the softmax that it shares with a segment."""

    keys: Tensor
    """[R, M, D]."""
    values: Tensor
    """[R, M, D]."""
    hidden: Tensor | None
    """[R or 1, 1, T, M] True where a token does not attend to a slot; None: it attends to all."""
    masked: bool
    """Whether a token may attend to nothing; else it attends to itself at least."""

    @classmethod
    def of(cls, tail: Tail, new: int) -> "_Newest":
        """The tail, which ends with `new` tokens."""
        batch, heads, slots, dim = tail.keys.shape
        keys, values, hidden = tail.keys, tail.values, None
        if new > 1 or tail.mask is not None or tail.used is not None:
            seen = causal_tail(new, slots, keys.device, tail.used) if tail.mask is None else tail.mask
            if tail.used is not None:
                unused = torch.arange(slots, device=keys.device) >= tail.used
                # Slots that were never written may be NaN, and 0 * NaN is NaN.
                seen, values = seen & ~unused, values.masked_fill(unused.unsqueeze(-1), 0)
            hidden = ~seen if len(seen) == 1 else ~seen.expand(batch, heads, -1, -1).reshape(-1, 1, new, slots)
        rows = batch * heads
        return cls(keys.reshape(rows, -1, dim), values.reshape(rows, -1, dim), hidden, tail.mask is not None)

    def rows(self, rows: slice | Tensor) -> "_Newest":
        """Some rows of the batch and heads."""
        hidden = self.hidden if self.hidden is None or len(self.hidden) == 1 else self.hidden[rows]
        return _Newest(self.keys[rows], self.values[rows], hidden, self.masked)


def _segment_attention(
    packed: Tensor,
    kept: Ragged,
    scaling: float,
    exact: torch.dtype,
    terms: SoftmaxTerms,
    newest: _Newest | None = None,
    needs_lse: bool = True,
) -> _Part:
    """Attention of packed queries [R, G*T, D] to the segments and the newest."""
    spans, device, dim = kept.host_spans(), packed.device, packed.shape[-1]
    assert spans.longest <= kept.longest
    constants = (scaling, exact, terms, needs_lse)
    views = spans.views
    if len(views) == 1:
        return _attend(packed, views[0].of(kept.keys), views[0].of(kept.values), newest, *constants)
    tiny = [view for view in views if 0 < view.rows * view.length * dim < _WORTH_A_CALL]
    short = [row for view in tiny for row in range(view.first, view.first + view.rows)] if len(tiny) > 2 else []
    order: list[int] = []
    parts = []
    for view in views:
        if view.first in short:
            continue
        rows = slice(view.first, view.first + view.rows)
        keys, values = view.of(kept.keys), view.of(kept.values)
        parts.append(_attend(packed[rows], keys, values, newest and newest.rows(rows), *constants))
        order += range(rows.start, rows.stop)
    if short:
        entry, absent = _padded_rows([spans[row] for row in short], device)
        keys, values = (
            pool.index_select(0, entry.flatten()).view(*entry.shape, dim) for pool in (kept.keys, kept.values)
        )
        queries, new = packed, newest
        if len(short) < len(spans):
            chosen = upload(short, device)
            queries, new = packed[chosen], newest and newest.rows(chosen)
        parts.append(_attend(queries, keys, values, new, *constants, absent))
        order += short
    output = _joined([output for output, _ in parts])
    lse = _joined([lse for _, lse in parts if lse is not None]) if needs_lse else None
    inverse = [place for _, place in sorted(zip(order, range(len(order)), strict=True))]
    if inverse == list(range(len(order))):
        return output, lse
    back = upload(inverse, device)
    return output[back], None if lse is None else lse[back]


def _joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    newest: _Newest | None,
    scaling: float,
    exact: torch.dtype,
    terms: SoftmaxTerms,
    needs_lse: bool,
    absent: Tensor | None = None,
) -> _Part:
    """Attention of queries [R, G*T, D] to rows [R, S, D] but what is `absent` [R, S], and to the newest."""
    if newest is None and absent is None and keys.shape[1] and _is_fused(queries, terms):
        output, fused_lse = fused_attention(queries[None], keys[None], values[None], scaling)
        return output[0], fused_lse[0].unsqueeze(-1)
    parts = [(keys, None if absent is None else absent[:, None, None])]
    if newest is not None:
        parts.append((newest.keys, newest.hidden))
    logits = _logits(queries, parts, scaling, exact, terms)
    lse = logits.logsumexp(-1, keepdim=True) if needs_lse else None
    return _weighted(logits, values, newest), lse


def _logits(
    queries: Tensor,
    parts: Sequence[tuple[Tensor, Tensor | None]],
    scaling: float,
    exact: torch.dtype,
    terms: SoftmaxTerms,
) -> Tensor:
    """Logits [R, G*T, S + …] of keys [R, S, D], …, -inf where `hidden` [R or 1, 1, T or 1, S]."""
    ignored = queries.new_empty(())  # by beta=0
    if exact != queries.dtype or torch.is_grad_enabled():
        logits = []
        for keys, hidden in parts:
            products = torch.baddbmm(ignored, queries, keys.mT, beta=0, alpha=scaling).to(exact)
            logits.append(_masked(terms.capped(products), hidden))
        return _joined(logits, -1)
    sizes = [keys.shape[1] for keys, _ in parts]
    buffer = queries.new_empty(*queries.shape[:2], sum(sizes))
    for target, (keys, hidden) in zip(buffer.split(sizes, -1), parts, strict=True):
        torch.baddbmm(ignored, queries, keys.mT, beta=0, alpha=scaling, out=target)
        if hidden is not None or terms.softcap is not None:
            target.copy_(_masked(terms.capped(target), hidden))
    return buffer


def _weighted(logits: Tensor, values: Tensor, newest: _Newest | None) -> Tensor:
    """Values [R, S, D], and those of the newest behind them, weighted by the softmax of logits [R, G*T, S + M]."""
    weight = logits.softmax(-1)
    if newest is None:
        return torch.bmm(weight.to(values.dtype), values)
    if newest.masked:
        weight = weight.masked_fill((logits == float("-inf")).all(-1, keepdim=True), 0)
    weight, entries = weight.to(values.dtype), values.shape[1]
    return torch.bmm(weight[..., :entries], values).baddbmm_(weight[..., entries:], newest.values)


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


def _masked(logits: Tensor, hidden: Tensor | None) -> Tensor:
    """Logits [R, G*T, S], -inf where `hidden` [R or 1, 1, T or 1, S]."""
    if hidden is None:
        return logits
    grouped = logits.view(len(logits), -1, hidden.shape[2], logits.shape[-1])
    return grouped.masked_fill(hidden, float("-inf")).flatten(1, 2)


def _padded_rows(spans: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Entries of the pool [R, longest] of rows padded with their last entry, and which of them are padding."""
    offset, length = (upload(column, device).unsqueeze(-1) for column in zip(*spans, strict=True))
    slot = torch.arange(max(count for _, count in spans), device=device)
    return offset + torch.minimum(slot, length - 1), slot >= length


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
