"""Compaction by a fixed number of programs that read on the device how much there is to copy."""

import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.device import processors

_PROGRAMS_PER_PROCESSOR = 8
_TILE = 4096  # elements of keys, and as many of values, that a program moves at once


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    start: Tensor,
    length: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
) -> None:
    rows, slots, dim = keys.shape
    block_d = triton.next_power_of_2(dim)
    assert out_keys.is_contiguous() and out_values.is_contiguous()
    _gather[(_PROGRAMS_PER_PROCESSOR * processors(keys.device),)](
        keys.contiguous(),
        values.contiguous(),
        index,
        first_row * slots,
        start,
        length,
        rows,
        out_keys,
        out_values,
        DIM=dim,
        BLOCK_N=max(_TILE // block_d, 1),
        BLOCK_D=block_d,
    )


@triton.jit(do_not_specialize=["offset"])
def _gather(
    keys,
    values,
    index,
    offset,
    start,
    length,
    rows,
    out_keys,
    out_values,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    begin = tl.load(start)
    end = tl.load(start + rows - 1) + tl.load(length + rows - 1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for block in range(tl.program_id(0), tl.cdiv(end - begin, BLOCK_N).to(tl.int32), tl.num_programs(0)):
        entry = begin + block * BLOCK_N + n
        there = entry < end
        source = (tl.load(index + entry, there, other=offset) - offset)[:, None] * DIM + d[None, :]
        target = entry[:, None] * DIM + d[None, :]
        present = there[:, None] & (d < DIM)[None, :]
        tl.store(out_keys + target, tl.load(keys + source, present), present)
        tl.store(out_values + target, tl.load(values + source, present), present)
