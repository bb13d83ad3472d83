"""Copies kept entries with a fixed number of programs, which read their share of the entries on the device."""

import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.device import processors
from learnkv.ops.rotary import Layout

_PROGRAMS_PER_PROCESSOR = 8
_TILE = 4096  # elements of keys, and as many of values, that a program moves at once


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    out: Ragged,
    rerotation: tuple[Tensor, Tensor, Tensor, Layout] | None,
) -> None:
    """`gather_kv` in Triton."""
    rows, slots, dim = keys.shape
    block_d = triton.next_power_of_2(dim)
    assert out.keys.is_contiguous()
    assert out.values.is_contiguous()
    *tables, layout = rerotation or (None, None, None, Layout(0, 0, 1, 0))
    _gather[(_PROGRAMS_PER_PROCESSOR * processors(keys.device),)](
        keys.contiguous(),
        values.contiguous(),
        index,
        first_row * slots,
        out.offset,
        out.length,
        rows,
        slots,
        out.keys,
        out.values,
        *tables,
        DIM=dim,
        PAIRS=layout.pairs,
        START=layout.start,
        STRIDE=layout.stride,
        GAP=layout.gap,
        BLOCK_N=max(_TILE // block_d, 1),
        BLOCK_D=block_d,
        BLOCK_F=triton.next_power_of_2(layout.pairs) if layout.pairs else 1,
    )


@triton.jit(do_not_specialize=["first_index", "slots"])
def _gather(
    keys,
    values,
    index,
    first_index,
    offset,
    length,
    rows,
    slots,
    out_keys,
    out_values,
    positions,
    first,
    frequencies,
    DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    START: tl.constexpr,
    STRIDE: tl.constexpr,
    GAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    begin = tl.load(offset)
    end = tl.load(offset + rows - 1) + tl.load(length + rows - 1)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    for block in range(tl.program_id(0), tl.cdiv(end - begin, BLOCK_N).to(tl.int32), tl.num_programs(0)):
        entry = begin + block * BLOCK_N + n
        valid = entry < end
        source = tl.load(index + entry, valid, other=first_index) - first_index
        gathered = source[:, None] * DIM + d[None, :]
        target = entry[:, None] * DIM + d[None, :]
        present = valid[:, None] & (d < DIM)[None, :]
        tl.store(out_values + target, tl.load(values + gathered, present), present)
        if PAIRS == 0:
            tl.store(out_keys + target, tl.load(keys + gathered, present), present)
        else:
            unrotated = present & ((d < START) | (d >= START + 2 * PAIRS))[None, :]
            tl.store(out_keys + target, tl.load(keys + gathered, unrotated), unrotated)
            f = tl.arange(0, BLOCK_F)
            row = source // slots
            to = tl.load(first + row, valid, other=0) + entry - tl.load(offset + row, valid, other=0)
            distance = (to - tl.load(positions + entry, valid, other=0)).to(tl.float32)
            angle = distance[:, None] * tl.load(frequencies + f, f < PAIRS, other=0)[None, :]
            cos, sin = tl.cos(angle), tl.sin(angle)
            pair = valid[:, None] & (f < PAIRS)[None, :]
            channel = START + STRIDE * f[None, :]
            left = tl.load(keys + source[:, None] * DIM + channel, pair).to(tl.float32)
            right = tl.load(keys + source[:, None] * DIM + channel + GAP, pair).to(tl.float32)
            target = out_keys + entry[:, None] * DIM + channel
            tl.store(target, (left * cos - right * sin).to(out_keys.dtype.element_ty), pair)
            tl.store(target + GAP, (right * cos + left * sin).to(out_keys.dtype.element_ty), pair)
