"""Page bounds that read every new key once, and page scores on the tensor cores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.arguments import Ragged

_PAGES = 8  # of one program: fewer, and a thread would load less than 16 bytes at once


def page_bounds(entries: Ragged, first: Tensor, bounds: Tensor, page_size: int, slots: Tensor | None) -> None:
    """`page_bounds` in Triton."""
    rows, _, pages, dim = bounds.shape
    assert entries.keys.is_contiguous()
    assert bounds.is_contiguous()
    touched = min(
        triton.cdiv(entries.longest, page_size) + 1, pages
    )  # one more, where the first entry is within a page
    _enclose[(rows, triton.cdiv(touched, _PAGES))](
        entries.keys,
        entries.offset,
        entries.length,
        first,
        bounds,
        slots,
        pages,
        0 if slots is None else slots.stride(0),
        PAGE=page_size,
        DIM=dim,
        HAS_SLOTS=slots is not None,
        PAGES=_PAGES,
        BLOCK_D=triton.next_power_of_2(dim),
    )


def page_scores(query: Tensor, bounds: Tensor, pages: Tensor, group_reduce: str) -> Tensor:
    """`page_scores` in Triton."""
    rows, _, count, dim = bounds.shape
    assert bounds.is_contiguous()
    group = query.numel() // (rows * dim)
    lists = rows * group if group_reduce == "none" else rows
    scores = query.new_empty(lists, count, dtype=torch.float32)
    block_d = max(triton.next_power_of_2(dim), 16)
    _score[(rows, triton.cdiv(count, 64))](
        query.contiguous(),
        bounds,
        pages,
        scores,
        count,
        GROUP=group,
        DIM=dim,
        GROUP_REDUCE=group_reduce,
        UPCAST=query.device.type == "cpu",
        BLOCK_G=max(triton.next_power_of_2(group), 16),
        BLOCK_P=64,
        BLOCK_D=block_d,
    )
    return scores


@triton.jit
def _enclose(
    keys,
    offset,
    length,
    first,
    bounds,
    slots,
    pages,
    slots_stride,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PAGES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin, count = tl.load(first + row).to(tl.int32), tl.load(length + row).to(tl.int32)
    page = begin // PAGE + tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    d = tl.arange(0, BLOCK_D)
    inside = ((page * PAGE < begin + count) & (page < pages))[:, None] & (d < DIM)[None, :]
    target = bounds + ((row * 2 * pages + page) * DIM)[:, None] + d[None, :]
    low = tl.load(target, inside, other=0).to(tl.float32)
    high = tl.load(target + pages * DIM, inside, other=0).to(tl.float32)
    pool = keys + tl.load(offset + row).to(tl.int64) * DIM
    for index in range(PAGE):
        entry = page * PAGE + index - begin
        valid = (entry >= 0) & (entry < count)
        place = entry
        if HAS_SLOTS:
            place = tl.load(slots + row * slots_stride + entry, valid, other=0).to(tl.int32)
        source = pool + (place.to(tl.int64) * DIM)[:, None] + d[None, :]
        key = tl.load(source, valid[:, None] & (d < DIM)[None, :], other=0).to(tl.float32)
        low = tl.where(valid[:, None], tl.minimum(low, key), low)
        high = tl.where(valid[:, None], tl.maximum(high, key), high)
    tl.store(target, low.to(bounds.dtype.element_ty), inside)
    tl.store(target + pages * DIM, high.to(bounds.dtype.element_ty), inside)


@triton.jit
def _score(
    query,
    bounds,
    pages,
    scores,
    count,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    GROUP_REDUCE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    used = tl.load(pages + row)
    valid = p < used
    q = tl.load(
        query + ((row * GROUP + g) * DIM)[:, None] + d[None, :], (g < GROUP)[:, None] & (d < DIM)[None, :], other=0
    )
    inside = valid[:, None] & (d < DIM)[None, :]
    source = bounds + ((row * 2 * count + p) * DIM)[:, None] + d[None, :]
    low = tl.load(source, inside, other=0)
    high = tl.load(source + count * DIM, inside, other=0)
    if UPCAST:
        q, low, high = q.to(tl.float32), low.to(tl.float32), high.to(tl.float32)
    above = tl.where(q.to(tl.float32) > 0, q, tl.zeros_like(q))
    below = tl.where(q.to(tl.float32) > 0, tl.zeros_like(q), q)
    bound = tl.dot(above, tl.trans(high), input_precision="ieee")
    bound = tl.dot(below, tl.trans(low), bound, input_precision="ieee")
    if GROUP_REDUCE == "none":
        target = scores + (row * GROUP + g)[:, None] * count + p[None, :]
        tl.store(target, tl.where(valid[None, :], bound, float("-inf")), (g < GROUP)[:, None] & (p < count)[None, :])
    else:
        if GROUP_REDUCE == "max":
            reduced = tl.max(tl.where((g < GROUP)[:, None], bound, float("-inf")), 0)
        else:
            reduced = tl.sum(tl.where((g < GROUP)[:, None], bound, 0.0), 0)
        if GROUP_REDUCE == "mean":
            reduced = reduced / GROUP
        tl.store(scores + row * count + p, tl.where(valid, reduced, float("-inf")), p < count)
