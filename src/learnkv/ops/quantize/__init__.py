"""Numbers to codes of a few bits with a scale and a zero per group, packed without gaps, and back.

Grids of b bits, for a group with smallest value lo and largest value hi:

- `offset`: code = round((x - zero) / scale), zero = lo, scale = (hi - lo) / (2^b - 1).
- `zero_point`: code = round(x / scale) + zero, zero = round(-lo / scale), the same scale; 0 has a code of its own.
- `zero_in_range`: the same, of a range that is extended to 0; a group of zeros gets the range -1 ... 1.
- `symmetric`: code = round(x / scale), scale = max|x| / (2^(b-1) - 1), stored with 2^(b-1) added; no zero.

Scale and zero are rounded to their dtype before codes are computed. A group with a NaN or an infinite number, or whose
scale or zero exceeds their dtype, is NaN as a whole.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.hadamard import check_hadamard

Grid = Literal["offset", "zero_point", "zero_in_range", "symmetric"]
Rotation = Literal["none", "hadamard"]
BITS = (2, 3, 4, 8)
_PACKING = ("reference",)
_IMPLEMENTATIONS = ("reference", "triton")


class Quantized(NamedTuple):
    """Vectors [..., D] as codes, in groups of g channels that follow each other."""

    codes: Tensor
    """[..., W] uint8, see `pack`."""
    scale: Tensor
    """[..., D / g]."""
    zero: Tensor | None
    """[..., D / g]; None: the grid is symmetric."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits that are packed together, the last byte padded."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int, *, impl: Impl = "auto") -> Tensor:
    """Codes [..., D] below 2^bits as bytes [..., W] uint8, W = `packed_bytes(D, bits)`.

    Code j occupies bits j * bits ... (j + 1) * bits - 1 of its vector, counted from the lowest bit of the first byte;
    codes of 3 bits cross bytes. Read as little-endian words, bytes are the layout that KIVI publishes.

    Raises:
        UserError: for bits outside of 1 ... 8.
    """
    _check_width(bits)
    packed: Tensor = implementation("quantize", impl, _PACKING, codes).pack(codes, bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int, *, impl: Impl = "auto") -> Tensor:
    """Codes [..., count] uint8 of `pack`."""
    _check_width(bits)
    codes: Tensor = implementation("quantize", impl, _PACKING, packed).unpack(packed, bits, count)
    return codes


def quantize(
    vectors: Tensor,
    bits: int,
    group: int | None = None,
    grid: Grid = "offset",
    scale_dtype: torch.dtype = torch.float16,
    *,
    impl: Impl = "auto",
) -> Quantized:
    """Codes, scales and zeros of vectors [..., D], computed in float32 at least; the vectors do not change.

    Args:
        vectors: of any real dtype.
        bits: of a code, one of `BITS`.
        group: neighbouring channels with one scale and zero; None: all D.
        grid: see above.
        scale_dtype: of scales and zeros.

    Raises:
        UserError: for bits that codes do not have, groups that do not divide D, or an unknown grid.
    """
    group = check_groups(vectors.shape[-1], bits, group)
    if grid not in get_args(Grid):
        raise UserError(f"grid={grid!r}: expected one of {', '.join(get_args(Grid))}")
    lacks = _lacks(grid, vectors.shape[-1] // group, vectors.dtype)
    quantized: Quantized = implementation("quantize", impl, _IMPLEMENTATIONS, vectors, lacks=lacks).quantize(
        vectors, bits, group, grid, scale_dtype
    )
    return quantized


def quantize_entries(
    source: Tensor,
    index: Tensor,
    bits: int,
    first_row: int = 0,
    rotation: Rotation = "none",
    scale_dtype: torch.dtype = torch.float16,
    out: Quantized | None = None,
    *,
    impl: Impl = "auto",
) -> Quantized:
    """Codes of entries that an eviction keeps, on the grid `offset` with one scale and zero per entry.

    The kernel gathers, rotates, quantises and packs in one pass.

    Args:
        source: [R, S, D] keys or values of a layer; they do not change.
        index: [N] int64 entries of this layer (`row * S + slot`), as `select` gives them.
        bits: of a code, one of `BITS`.
        first_row: number of this layer's first row in `index`.
        rotation: of the channels before they are rounded.
        scale_dtype: of scales and zeros; that of `out` where it is given.
        out: contiguous memory that is written, such as a slice of a pool; None: new tensors.

    Raises:
        UserError: for bits that codes do not have, or a rotation of a D that has none.
    """
    check_bits(bits)
    if rotation not in get_args(Rotation):
        raise UserError(f"rotation={rotation!r}: expected one of {', '.join(get_args(Rotation))}")
    if rotation == "hadamard":
        check_hadamard(source.shape[-1])
    out = empty(len(index), source.shape[-1], bits, scale_dtype, source.device) if out is None else out
    assert out.codes.shape == (len(index), packed_bytes(source.shape[-1], bits))
    lacks = _lacks("offset", 1, source.dtype)
    implementation("quantize", impl, _IMPLEMENTATIONS, source, lacks=lacks).quantize_entries(
        source, index, bits, first_row, rotation, out
    )
    return out


def empty(count: int, dim: int, bits: int, scale_dtype: torch.dtype, device: torch.device) -> Quantized:
    """Memory for codes of vectors [count, dim] with one scale and zero each."""
    codes = torch.empty(count, packed_bytes(dim, bits), dtype=torch.uint8, device=device)
    scale, zero = (torch.empty(count, 1, dtype=scale_dtype, device=device) for _ in range(2))
    return Quantized(codes, scale, zero)


def dequantize(quantized: Quantized, bits: int, dim: int, grid: Grid = "offset", *, impl: Impl = "auto") -> Tensor:
    """Vectors [..., dim] float32 of codes that `quantize` made with the same bits and grid."""
    lacks = _lacks(grid, quantized.scale.shape[-1])
    vectors: Tensor = implementation("quantize", impl, _IMPLEMENTATIONS, quantized.codes, lacks=lacks).dequantize(
        quantized, bits, dim, grid
    )
    return vectors


def round_trip(
    vectors: Tensor,
    bits: int,
    group: int | None = None,
    grid: Grid = "offset",
    scale_dtype: torch.dtype = torch.float16,
) -> Tensor:
    """`dequantize` of `quantize` [..., D] float32, for training, which stores no codes; arguments as of `quantize`."""
    group = check_groups(vectors.shape[-1], bits, group)
    reference = implementation("quantize", "reference", _IMPLEMENTATIONS, vectors)
    stored: Tensor = reference.round_trip(vectors, bits, group, grid, scale_dtype)
    return stored


def _lacks(grid: Grid, groups: int, dtype: torch.dtype = torch.float32) -> str | None:
    """What the kernels do not have: they compute in float32, on one grid, with one group per vector."""
    if grid != "offset":
        return f"grid={grid!r}"
    if groups != 1:
        return f"{groups} groups per vector"
    return f"{dtype}" if dtype == torch.float64 else None


def check_groups(dim: int, bits: int, group: int | None) -> int:
    """The size of a group, `dim` for None.

    Raises:
        UserError: for bits that codes do not have, or groups that do not divide `dim`.
    """
    check_bits(bits)
    group = dim if group is None else group
    if group < 1 or dim % group:
        raise UserError(f"group={group}: expected a divisor of the {dim} numbers that share codes")
    return group


def check_bits(bits: int) -> None:
    """Raise UserError for bits that codes do not have."""
    if bits not in BITS:
        raise UserError(f"bits={bits}: expected one of {', '.join(map(str, BITS))}")


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise UserError(f"bits={bits}: expected 1 to 8")
