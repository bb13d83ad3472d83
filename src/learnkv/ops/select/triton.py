"""Top-k of ragged rows by radix: four histograms of eight bits find the threshold, two passes write the entries.

Every pass is split over slots as well as rows, so that a single layer occupies the whole device. Counts are integers,
so their sums, and the result, do not depend on the order of programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # slots per program: the histogram of a block costs its 256 atomic additions little


def select(scores: Tensor, budget: Tensor, total: int) -> Tensor:
    """`select` in Triton."""
    rows, slots = scores.shape
    chosen = torch.empty(total, dtype=torch.int64, device=scores.device)
    if total == 0:
        return chosen
    scores, budget = scores.contiguous(), budget.contiguous()
    parts = triton.cdiv(slots, _BLOCK)
    counts = torch.zeros(4, rows, 256, dtype=torch.int32, device=scores.device)
    for digit in range(4):
        _count_digits[(rows, parts)](scores, budget, counts, rows, slots, DIGIT=digit, BLOCK=_BLOCK, num_warps=8)
    kept = torch.empty(rows, parts, 2, dtype=torch.int32, device=scores.device)
    _count_kept[(rows, parts)](scores, budget, counts, kept, rows, slots, BLOCK=_BLOCK, num_warps=8)
    _write[(rows, parts)](
        scores,
        budget,
        budget.cumsum(0),
        counts,
        kept,
        chosen,
        rows,
        slots,
        PARTS=triton.next_power_of_2(parts),
        BLOCK=_BLOCK,
        num_warps=8,
    )
    return chosen


def select_slots(scores: Tensor, budget: Tensor, most: int) -> Tensor:
    """`select_slots` in Triton."""
    rows, slots = scores.shape
    chosen = torch.empty(rows, most, dtype=torch.int32, device=scores.device)
    if most:
        block = min(triton.next_power_of_2(max(slots, most)), _BLOCK)
        _list_slots[(rows,)](scores.contiguous(), budget.contiguous(), chosen, slots, most, BLOCK=block, num_warps=8)
    return chosen


@triton.jit
def _sort_key(score):
    """uint32 that orders as float32 does: NaN highest, the two zeros equal."""
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    key = bits ^ tl.where(bits >= 0x80000000, 0xFFFFFFFF, 0x80000000)
    return tl.where(score != score, 0xFFFFFFFF, key).to(tl.uint32)


@triton.jit
def _threshold(budget, counts, row, rows, DIGITS: tl.constexpr):
    """The leading digits of the lowest key that is kept, and how many of the keys that share them are kept.

    A row that keeps nothing gets the highest digits, above which valid is no key.
    """
    value = tl.arange(0, 256)
    missing = tl.load(budget + row).to(tl.int32)
    prefix = tl.zeros([], tl.uint32)
    for digit in tl.static_range(DIGITS):
        count = tl.load(counts + (digit * rows + row).to(tl.int64) * 256 + value)
        above = tl.sum(count) - tl.cumsum(count)
        here = (above < missing) & (above + count >= missing)
        digit_value = tl.where(missing == 0, 255, tl.sum(tl.where(here, value, 0)))
        missing -= tl.sum(tl.where(here, above, 0))
        prefix = (prefix << 8) | digit_value.to(tl.uint32)
    return prefix, missing


@triton.jit
def _keys(scores, row, slots, BLOCK: tl.constexpr):
    slot = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = slot < slots
    return _sort_key(tl.load(scores + row.to(tl.int64) * slots + slot, valid, other=0)), slot, valid


@triton.jit
def _count_digits(scores, budget, counts, rows, slots, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    key, _, valid = _keys(scores, row, slots, BLOCK)
    if DIGIT > 0:
        prefix, _ = _threshold(budget, counts, row, rows, DIGIT)
        valid = valid & ((key >> (32 - 8 * DIGIT)) == prefix)
    count = tl.histogram(((key >> (24 - 8 * DIGIT)) & 255).to(tl.int32), 256, mask=valid)
    value = tl.arange(0, 256)
    tl.atomic_add(counts + (DIGIT * rows + row).to(tl.int64) * 256 + value, count, mask=count > 0, sem="relaxed")


@triton.jit
def _count_kept(scores, budget, counts, kept, rows, slots, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    threshold, _ = _threshold(budget, counts, row, rows, 4)
    key, _, valid = _keys(scores, row, slots, BLOCK)
    target = kept + (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(target, tl.sum((valid & (key > threshold)).to(tl.int32)))
    tl.store(target + 1, tl.sum((valid & (key == threshold)).to(tl.int32)))


@triton.jit
def _write(scores, budget, ends, counts, kept, chosen, rows, slots, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    threshold, ties = _threshold(budget, counts, row, rows, 4)
    part = tl.arange(0, PARTS)
    before = kept + (row.to(tl.int64) * tl.num_programs(1) + part) * 2
    earlier = part < tl.program_id(1)
    above = tl.sum(tl.load(before, earlier, other=0))
    tied = tl.sum(tl.load(before + 1, earlier, other=0))

    key, slot, valid = _keys(scores, row, slots, BLOCK)
    tie = (valid & (key == threshold)).to(tl.int32)
    keep = valid & ((key > threshold) | ((tie == 1) & (tied + tl.cumsum(tie) <= ties)))
    rank = tl.cumsum(keep.to(tl.int32)) - 1
    begin = tl.load(ends + row) - tl.load(budget + row) + above + tl.minimum(tied, ties)
    tl.store(chosen + begin + rank, row.to(tl.int64) * slots + slot, keep)


@triton.jit
def _entries(scores, row, begin, slots, BLOCK: tl.constexpr):
    slot = begin + tl.arange(0, BLOCK)
    score = tl.load(scores + row * slots + slot, slot < slots, other=float("-inf"))
    return _sort_key(score), slot, score != float("-inf")


@triton.jit(do_not_specialize=["slots", "most"])
def _list_slots(scores, budget, chosen, slots, most, BLOCK: tl.constexpr):
    """The four histograms and the list of one row, by one program: rows are short and stay in the L1 cache."""
    row = tl.program_id(0).to(tl.int64)
    value = tl.arange(0, 256)
    entries = 0
    for begin in range(0, slots, BLOCK):
        _, _, valid = _entries(scores, row, begin, slots, BLOCK)
        entries += tl.sum(valid.to(tl.int32))
    missing = tl.minimum(tl.minimum(tl.load(budget + row).to(tl.int32), entries), most)
    keeps = missing
    prefix = tl.zeros([], tl.uint32)
    for digit in tl.static_range(4):
        count = tl.zeros([256], tl.int32)
        for begin in range(0, slots, BLOCK):
            key, _, valid = _entries(scores, row, begin, slots, BLOCK)
            if digit > 0:
                valid = valid & ((key >> (32 - 8 * digit)) == prefix)
            count += tl.histogram(((key >> (24 - 8 * digit)) & 255).to(tl.int32), 256, mask=valid)
        above = tl.sum(count) - tl.cumsum(count)
        here = (above < missing) & (above + count >= missing)
        digit_value = tl.where(missing == 0, 255, tl.sum(tl.where(here, value, 0)))
        missing -= tl.sum(tl.where(here, above, 0))
        prefix = (prefix << 8) | digit_value.to(tl.uint32)
    listed = 0
    tied = 0
    for begin in range(0, slots, BLOCK):
        key, slot, valid = _entries(scores, row, begin, slots, BLOCK)
        tie = (valid & (key == prefix)).to(tl.int32)
        keep = (valid & (key > prefix)) | ((tie == 1) & (tied + tl.cumsum(tie) <= missing))
        rank = listed + tl.cumsum(keep.to(tl.int32)) - 1
        tl.store(chosen + row * most + rank, slot, keep)
        listed += tl.sum(keep.to(tl.int32))
        tied += tl.sum(tie)
    for begin in range(0, most, BLOCK):
        rank = begin + tl.arange(0, BLOCK)
        tl.store(chosen + row * most + rank, tl.full([BLOCK], -1, tl.int32), (rank >= keeps) & (rank < most))
