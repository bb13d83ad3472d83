"""Ragged split-KV decode attention: equal shares of all blocks of all rows, partial results merged in a fixed order.

Every program takes a contiguous stretch of the blocks of all rows, segments and tails alike, so that the longest row
does not decide the run time; where pages are read, a row's blocks are those of its list. All query heads of a kv head
are one tile. Programs compute their share on the device from `length`: no host sync, and a CUDA graph stays valid while
lengths change.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.arguments import Pages, Ragged, Tail, Tier
from learnkv.ops.device import processors
from learnkv.ops.tail_slots import tail_slots

_LOG2E = 1.4426950408889634
_PROGRAMS_PER_PROCESSOR = 2  # two of them fit into shared memory, and one wave leaves nothing to schedule


def decode_attention(
    query: Tensor, kept: Ragged, tail: Tail, scaling: float, pages: Pages | None, tiers: Sequence[Tier] = ()
) -> tuple[Tensor, Tensor]:
    """`decode_attention` in Triton."""
    if tiers:
        raise UserError("impl=triton: entries in fewer bits are read by impl=reference")
    batch, query_heads, new, dim = query.shape
    tail_keys, tail_values, _, used = tail
    slots = tail_keys.shape[2]
    heads = tail_keys.shape[1] if pages is None else pages.numbers.shape[0] // batch  # of which each is one row of work
    rows, packed = batch * heads, query_heads // heads * new
    assert slots > 0, "the tail ends with the new tokens"
    assert all(part.is_contiguous() for part in kept[:4])
    query = query if query.stride(-1) == 1 else query.contiguous()
    # Tokens must follow each other as in the pool; a decode buffer has that layout, other tails are copied.
    if tail_keys.stride() != tail_values.stride() or tail_keys.stride()[2:] != (dim, 1):
        tail_keys, tail_values = tail_keys.contiguous(), tail_values.contiguous()
    mask = None if tail.mask is None else tail.mask.expand(batch, 1, new, slots)
    order = count = None
    if pages is not None:
        assert pages.numbers.is_contiguous()
        if mask is not None:
            (order, count), mask = tail_slots(mask[:, 0, 0], used), None

    shape = _tiles(packed, dim, query.element_size())
    tiles = triton.cdiv(packed, shape["BLOCK_M"])
    programs = max(_PROGRAMS_PER_PROCESSOR * processors(query.device) // tiles, 1)
    output = torch.empty(batch, query_heads, new, dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(batch, query_heads, new, dtype=torch.float32, device=query.device)
    # Of a program's rows only the first and the last can be shared with others.
    partial = torch.empty(programs * 2, packed, dim, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(programs * 2, packed, dtype=torch.float32, device=query.device)
    table = {
        "ROWS": triton.next_power_of_2(rows),
        "HAS_LENGTH": used is not None,
        "PAGE": 0 if pages is None else pages.size,
    }
    listed = 0 if pages is None else pages.numbers.shape[1]
    _attend[(programs, tiles)](
        query,
        *kept[:4],
        tail_keys,
        tail_values,
        mask,
        used,
        None if pages is None else pages.numbers,
        order,
        count,
        output,
        lse,
        partial,
        partial_lse,
        scaling * _LOG2E,
        rows,
        slots,
        listed,
        new,
        packed,
        query.stride(),
        tail_keys.stride(),
        None if mask is None else mask.stride(),
        HEADS=heads,
        SHARE=heads // tail_keys.shape[1],
        DIM=dim,
        HAS_SLOTS=order is not None,
        HAS_MASK=mask is not None,
        UPCAST=query.device.type == "cpu",
        **table,
        **shape,
    )
    if programs == 1:
        return output, lse
    _merge[(rows, packed)](
        kept.length,
        used,
        output,
        lse,
        partial,
        partial_lse,
        programs,
        rows,
        slots,
        listed,
        packed,
        DIM=dim,
        BLOCK_N=shape["BLOCK_N"],
        BLOCK_D=shape["BLOCK_D"],
        **table,
    )
    return output, lse


def _tiles(packed: int, dim: int, element_size: int) -> dict[str, int]:
    """Tile sizes and launch options: what stays in registers and leaves room for two programs per processor."""
    block_d = max(triton.next_power_of_2(dim), 16)
    block_m = min(max(triton.next_power_of_2(packed), 16), 64)
    wide = block_d * element_size > 256
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if wide else 64,
        "BLOCK_D": block_d,
        "num_warps": 8 if block_m * block_d >= 8192 else 4,
        "num_stages": 3,
    }


@triton.jit
def _blocks(
    length,
    tail_length,
    rows,
    tail,
    listed,
    ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blocks of every row [ROWS], and the slots of the tail in use."""
    row = tl.arange(0, ROWS)
    used = tail
    if HAS_LENGTH:
        used = tl.load(tail_length).to(tl.int32)
    if PAGE:
        blocks = tl.where(row < rows, tl.cdiv(listed * PAGE, BLOCK_N), 0)
    else:
        kept = tl.load(length + row, mask=row < rows, other=0).to(tl.int32)
        blocks = tl.where(row < rows, tl.cdiv(kept, BLOCK_N) + tl.cdiv(used, BLOCK_N), 0)
    return blocks, used


@triton.jit(do_not_specialize=["tail", "listed"])
def _attend(
    query,
    keys,
    values,
    offset,
    length,
    tail_keys,
    tail_values,
    tail_mask,
    tail_length,
    pages,
    order,
    valid_count,
    output,
    lse,
    partial,
    partial_lse,
    scale,
    rows,
    tail,
    listed,
    new,
    packed,
    query_stride,
    tail_stride,
    mask_stride,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks, used = _blocks(length, tail_length, rows, tail, listed, ROWS, HAS_LENGTH, PAGE, BLOCK_N)
    total = tl.sum(blocks)
    share = tl.cdiv(total, tl.num_programs(0))
    program = tl.program_id(0)
    current = program * share
    stop = tl.minimum(current + share, total)
    row = tl.sum((tl.cumsum(blocks) <= current).to(tl.int32))
    first = tl.sum(tl.where(tl.arange(0, ROWS) < row, blocks, 0))  # block at which the row begins

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # query head and token, as the output has them
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token = m % new
    inside = (m < packed)[:, None] & (d < DIM)[None, :]
    tile = n[:, None] * DIM + d[None, :]

    while current < stop:
        batch, head = row // HEADS, row % HEADS
        pool_row = row // SHARE  # row of the pool, which query heads with lists of their own share
        kept = tl.load(length + pool_row).to(tl.int32)
        kept_blocks = tl.cdiv(kept, BLOCK_N)
        count = kept_blocks + tl.cdiv(used, BLOCK_N)
        entries = kept + used
        if PAGE:
            count = tl.cdiv(listed * PAGE, BLOCK_N)
            if HAS_SLOTS:
                entries = kept + tl.load(valid_count + batch).to(tl.int32)
        segment = tl.load(offset + pool_row).to(tl.int64) * DIM
        recent = batch.to(tl.int64) * tail_stride[0] + (head // SHARE).to(tl.int64) * tail_stride[1]
        query_row = query + batch.to(tl.int64) * query_stride[0] + head * (packed // new) * query_stride[1]
        source = (m // new * query_stride[1] + token * query_stride[2])[:, None] + d[None, :]
        q = tl.load(query_row + source, inside, other=0)
        if UPCAST:
            q = q.to(tl.float32)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        mass = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for block in range(current - first, tl.minimum(stop - first, count)):
            if PAGE:
                item = block * BLOCK_N + n
                page = tl.load(pages + row.to(tl.int64) * listed + item // PAGE, item < listed * PAGE, other=-1)
                slot = page.to(tl.int32) * PAGE + item % PAGE
                valid = (slot >= 0) & (slot < entries)
                in_tail = slot >= kept
                place = slot
                if HAS_SLOTS:
                    into = order + batch.to(tl.int64) * tail + slot - kept
                    place = tl.where(in_tail, tl.load(into, valid & in_tail, other=0).to(tl.int32) + kept, slot)
                shift = tl.where(in_tail, recent + (place - kept) * DIM, segment + place.to(tl.int64) * DIM)
                from_keys = (tl.where(in_tail, tail_keys, keys) + shift)[:, None]
                from_values = (tl.where(in_tail, tail_values, values) + shift)[:, None]
                within = d[None, :]
            else:
                # One loop for segment and tail: a pipeline of loads that does not run dry between them.
                in_tail = block >= kept_blocks
                begin = tl.where(in_tail, block - kept_blocks, block) * BLOCK_N
                slot = begin + n
                valid = slot < tl.where(in_tail, used, kept)
                shift = tl.where(in_tail, recent, segment) + begin * DIM
                from_keys = tl.where(in_tail, tail_keys, keys) + shift
                from_values = tl.where(in_tail, tail_values, values) + shift
                within = tile
            present = valid[:, None] & (d < DIM)[None, :]
            k = tl.load(from_keys + within, present, 0, eviction_policy="evict_first")
            v = tl.load(from_values + within, present, 0, eviction_policy="evict_first")
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            attended = valid[None, :]
            if PAGE == 0:
                attended = attended & (~in_tail | (slot[None, :] <= used - new + token[:, None]))
            if HAS_MASK:
                in_mask = in_tail & valid[None, :] & (m < packed)[:, None]
                mask_row = tail_mask + batch.to(tl.int64) * mask_stride[0]
                mask_row += (token * mask_stride[2])[:, None] + (slot * mask_stride[3])[None, :]
                attended = valid[None, :] & (~in_tail | tl.load(mask_row, in_mask, other=0))
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where(attended, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            mass = mass * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = higher

        acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
        log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
        where = m[:, None] * DIM + d[None, :]
        if first // share == (first + count - 1) // share:
            target = row.to(tl.int64) * packed
            tl.store(output + target * DIM + where, acc.to(output.dtype.element_ty), inside)
            tl.store(lse + target + m, log_mass / 1.4426950408889634, m < packed)
        else:  # a row that began before this program is its first, any other its last
            target = (program * 2 + (first >= program * share).to(tl.int32)).to(tl.int64) * packed
            tl.store(partial + target * DIM + where, acc, inside)
            tl.store(partial_lse + target + m, log_mass, m < packed)
        first += count
        current = first
        row += 1


@triton.jit(do_not_specialize=["programs", "tail", "listed"])
def _merge(
    length,
    tail_length,
    output,
    lse,
    partial,
    partial_lse,
    programs,
    rows,
    tail,
    listed,
    packed,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr = 16,
):
    """Merge the partial results of one row and query, in the order of the row's blocks."""
    row, m = tl.program_id(0), tl.program_id(1)
    blocks, _ = _blocks(length, tail_length, rows, tail, listed, ROWS, HAS_LENGTH, PAGE, BLOCK_N)
    share = tl.cdiv(tl.sum(blocks), programs)
    index = tl.arange(0, ROWS)
    first = tl.sum(tl.where(index < row, blocks, 0))
    head = first // share
    tail_end = (first + tl.sum(tl.where(index == row, blocks, 0)) - 1) // share
    if head == tail_end:
        return
    d = tl.arange(0, BLOCK_D)
    top = float("-inf")
    mass = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(head, tail_end + 1, PARTS):
        part = begin + tl.arange(0, PARTS)
        valid = part <= tail_end
        source = (part * 2 + (part == head).to(tl.int32)).to(tl.int64) * packed + m
        log_mass = tl.load(partial_lse + source, valid, other=float("-inf"))
        part_acc = tl.load(partial + source[:, None] * DIM + d[None, :], valid[:, None] & (d < DIM)[None, :], other=0)
        higher = tl.maximum(top, tl.max(log_mass))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(log_mass - base)
        shrink = tl.exp2(top - base)
        mass = mass * shrink + tl.sum(weight)
        acc = acc * shrink + tl.sum(weight[:, None] * part_acc, 0)
        top = higher
    acc = acc / tl.where(mass == 0, 1.0, mass)
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
    target = row.to(tl.int64) * packed + m
    tl.store(output + target * DIM + d, acc.to(output.dtype.element_ty), d < DIM)
    tl.store(lse + target, log_mass / 1.4426950408889634)
