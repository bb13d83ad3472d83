"""Quantises and packs in PyTorch."""

import torch
from torch import Tensor

from learnkv.ops.hadamard import hadamard
from learnkv.ops.quantize import Grid, Quantized, Rotation


def pack(codes: Tensor, bits: int) -> Tensor:
    """`pack` in PyTorch."""
    count = codes.shape[-1]
    stream = (codes.to(torch.uint8).unsqueeze(-1) >> _places(bits, codes) & 1).flatten(-2)
    size = -(-count * bits // 8)
    stream = torch.nn.functional.pad(stream, (0, 8 * size - count * bits)).unflatten(-1, (size, 8))
    packed: Tensor = (stream << _places(8, codes)).sum(-1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """`unpack` in PyTorch."""
    stream = (packed.unsqueeze(-1) >> _places(8, packed) & 1).flatten(-2)[..., : count * bits]
    codes: Tensor = (stream.unflatten(-1, (count, bits)) << _places(bits, packed)).sum(-1, dtype=torch.uint8)
    return codes


def quantize(vectors: Tensor, bits: int, group: int, grid: Grid, scale_dtype: torch.dtype) -> Quantized:
    """`quantize` in PyTorch."""
    exact = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    exact = exact.unflatten(-1, (exact.shape[-1] // group, group))
    low, high = exact.amin(-1), exact.amax(-1)
    if grid == "zero_in_range":
        low, high = _with_zero(low, high)
    stored = _scale(low, high, bits, grid, torch.finfo(scale_dtype)).to(scale_dtype)
    scale = stored.to(exact.dtype)
    zero = None if grid == "symmetric" else (low if grid == "offset" else (-low / scale).round()).to(scale_dtype)
    codes = _codes(exact, scale.unsqueeze(-1), zero, bits, grid)
    valid = stored.isfinite() & low.isfinite() & high.isfinite()
    valid = valid if zero is None else valid & zero.isfinite()
    return Quantized(pack(codes.flatten(-2), bits), stored.masked_fill(~valid, torch.nan), zero)


def quantize_entries(
    source: Tensor, index: Tensor, bits: int, first_row: int, rotation: Rotation, out: Quantized
) -> None:
    """`quantize_entries` in PyTorch."""
    rows, slots, dim = source.shape
    vectors = source.detach().reshape(rows * slots, dim).index_select(0, index - first_row * slots)
    if rotation == "hadamard":
        exact = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        vectors = exact @ hadamard(dim, exact.device).to(exact.dtype)
    for target, made in zip(out, quantize(vectors, bits, dim, "offset", out.scale.dtype), strict=True):
        assert target is not None
        assert made is not None
        target.copy_(made)


def dequantize(quantized: Quantized, bits: int, dim: int, grid: Grid) -> Tensor:
    """`dequantize` in PyTorch."""
    packed, scale, zero = quantized
    scale = scale.float().unsqueeze(-1)
    codes: Tensor = unpack(packed, bits, dim).unflatten(-1, (scale.shape[-2], dim // scale.shape[-2])).float()
    if zero is None:
        vectors: Tensor = (codes - 2 ** (bits - 1)) * scale
    elif grid == "offset":
        vectors = codes * scale + zero.float().unsqueeze(-1)
    else:
        vectors = (codes - zero.float().unsqueeze(-1)) * scale
    return vectors.flatten(-2)


def _with_zero(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Ranges extended to 0; -1 ... 1 for groups of zeros."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    empty = (low == 0) & (high == 0)
    return low.masked_fill(empty, -1), high.masked_fill(empty, 1)


def _scale(low: Tensor, high: Tensor, bits: int, grid: Grid, limits: torch.finfo) -> Tensor:
    """Scales of ranges, at least the smallest number of their dtype: constant groups have a scale, too."""
    largest = torch.maximum(-low, high)
    scale: Tensor = largest / (2 ** (bits - 1) - 1) if grid == "symmetric" else (high - low) / (2**bits - 1)
    if grid in ("zero_point", "zero_in_range"):
        # A group far from 0 gets steps as wide as the dtype's own, so that the dtype holds its integer zero.
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) * limits.eps)
    return scale.clamp(min=limits.smallest_normal * limits.eps)


def _codes(exact: Tensor, scale: Tensor, zero: Tensor | None, bits: int, grid: Grid) -> Tensor:
    """Codes [..., D / g, g], float; 0 for what is not a number."""
    levels, half = 2**bits - 1, 2 ** (bits - 1)
    if zero is None:
        codes: Tensor = (exact / scale).round().clamp(-half, half - 1) + half
    elif grid == "offset":
        codes = ((exact - zero.to(exact.dtype).unsqueeze(-1)) / scale).clamp(0, levels).round()
    else:
        codes = ((exact / scale).round() + zero.to(exact.dtype).unsqueeze(-1)).clamp(0, levels)
    return codes.nan_to_num(0)


def _places(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, device=like.device, dtype=torch.uint8)
