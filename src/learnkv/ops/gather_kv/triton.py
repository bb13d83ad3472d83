"""Compaction by a fixed number of programs that read on the device how much there is to copy."""

from collections.abc import Sequence

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
    rerotation: tuple[Tensor, Tensor, Tensor] | None,
    spans: Sequence[tuple[int, int]] | None,
) -> None:
    rows, slots, dim = keys.shape
    block_d = triton.next_power_of_2(dim)
    assert out_keys.is_contiguous() and out_values.is_contiguous()
    half = 0 if rerotation is None else len(rerotation[2])
    _gather[(_PROGRAMS_PER_PROCESSOR * processors(keys.device),)](
        keys.contiguous(),
        values.contiguous(),
        index,
        first_row * slots,
        start,
        length,
        rows,
        slots,
        out_keys,
        out_values,
        *(rerotation or (None, None, None)),
        DIM=dim,
        HALF=half,
        BLOCK_N=max(_TILE // block_d, 1),
        BLOCK_D=block_d,
        BLOCK_H=triton.next_power_of_2(half) if half else 1,
    )


@triton.jit(do_not_specialize=["offset", "slots"])
def _gather(
    keys,
    values,
    index,
    offset,
    start,
    length,
    rows,
    slots,
    out_keys,
    out_values,
    positions,
    first,
    frequencies,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    begin = tl.load(start)
    end = tl.load(start + rows - 1) + tl.load(length + rows - 1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for block in range(tl.program_id(0), tl.cdiv(end - begin, BLOCK_N).to(tl.int32), tl.num_programs(0)):
        entry = begin + block * BLOCK_N + n
        there = entry < end
        source = tl.load(index + entry, there, other=offset) - offset
        whence = source[:, None] * DIM + d[None, :]
        target = entry[:, None] * DIM + d[None, :]
        present = there[:, None] & (d < DIM)[None, :]
        tl.store(out_values + target, tl.load(values + whence, present), present)
        if HALF == 0:
            tl.store(out_keys + target, tl.load(keys + whence, present), present)
        else:
            unrotated = present & (d >= 2 * HALF)[None, :]
            tl.store(out_keys + target, tl.load(keys + whence, unrotated), unrotated)
            h = tl.arange(0, BLOCK_H)
            row = source // slots
            to = tl.load(first + row, there, other=0) + entry - tl.load(start + row, there, other=0)
            distance = (to - tl.load(positions + entry, there, other=0)).to(tl.float32)
            angle = distance[:, None] * tl.load(frequencies + h, h < HALF, other=0)[None, :]
            cos, sin = tl.cos(angle), tl.sin(angle)
            pair = there[:, None] & (h < HALF)[None, :]
            one = tl.load(keys + source[:, None] * DIM + h[None, :], pair).to(tl.float32)
            other = tl.load(keys + source[:, None] * DIM + HALF + h[None, :], pair).to(tl.float32)
            target = out_keys + entry[:, None] * DIM + h[None, :]
            tl.store(target, (one * cos - other * sin).to(out_keys.dtype.element_ty), pair)
            tl.store(target + HALF, (other * cos + one * sin).to(out_keys.dtype.element_ty), pair)
