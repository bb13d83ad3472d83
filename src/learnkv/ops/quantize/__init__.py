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

Grid = Literal["offset", "zero_point", "zero_in_range", "symmetric"]
BITS = (2, 3, 4, 8)
_IMPLEMENTATIONS = ("reference",)


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
    packed: Tensor = implementation("quantize", impl, _IMPLEMENTATIONS, codes).pack(codes, bits)
    return packed


def unpack(packed: Tensor, bits: int, count: int, *, impl: Impl = "auto") -> Tensor:
    """Codes [..., count] uint8 of `pack`."""
    _check_width(bits)
    codes: Tensor = implementation("quantize", impl, _IMPLEMENTATIONS, packed).unpack(packed, bits, count)
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
    quantized: Quantized = implementation("quantize", impl, _IMPLEMENTATIONS, vectors).quantize(
        vectors, bits, group, grid, scale_dtype
    )
    return quantized


def dequantize(quantized: Quantized, bits: int, dim: int, grid: Grid = "offset", *, impl: Impl = "auto") -> Tensor:
    """Vectors [..., dim] float32 of codes that `quantize` made with the same bits and grid."""
    vectors: Tensor = implementation("quantize", impl, _IMPLEMENTATIONS, quantized.codes).dequantize(
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
