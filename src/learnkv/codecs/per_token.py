"""Codes per token: a scale and a zero for every entry, or for groups of its channels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, ScaleDtype, Source, check_choice, torch_dtype
from learnkv.ops.arguments import Codes
from learnkv.ops.hadamard import check_hadamard, hadamard
from learnkv.ops.quantize import (
    Grid,
    Quantized,
    check_bits,
    check_groups,
    dequantize,
    packed_bytes,
    quantize,
    round_trip,
)

Rotation = Literal["none", "hadamard"]


class PerToken(Codec):
    """Asymmetric codes of 2, 3, 4 or 8 bits with a scale and a zero per entry and group of channels.

    |x - x'| <= scale / 2, plus what the smallest and the largest number lose where scale and zero are rounded to their
    dtype. A rotation spreads outliers over all channels (QuaRot, arXiv 2404.00456); it comes after RoPE. Entries do not
    depend on each other: any of them can be evicted later.

    Args:
        bits: of a code.
        rotation: of the channels before they are rounded.
        group: channels with one scale and zero; None: all.
        grid: see `ops.quantize`; symmetric codes have no zero.
        scale_dtype: of scales and zeros.
    """

    independent = True

    def __init__(
        self,
        bits: int = 4,
        rotation: Rotation = "hadamard",
        group: int | None = None,
        grid: Grid = "offset",
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        super().__init__()
        check_bits(bits)
        check_choice("rotation", rotation, Rotation)
        check_choice("grid", grid, Grid)
        check_choice("scale_dtype", scale_dtype, ScaleDtype)
        self.bits, self.rotation, self.group, self.grid, self.scale_dtype = bits, rotation, group, grid, scale_dtype

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        return hadamard(head_dim, device).unsqueeze(0) if self.rotation == "hadamard" else None

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        if self.rotation == "hadamard":
            check_hadamard(head_dim)
        groups = head_dim // check_groups(head_dim, self.bits, self.group)
        return sum(entries) * (packed_bytes(head_dim, self.bits) + groups * scale_bytes(self.grid, self.scale_dtype))

    def _encode(self, source: Source) -> dict[str, Tensor]:
        scale_dtype = torch_dtype(self.scale_dtype)
        return as_tensors(quantize(source.entries, self.bits, self.group, self.grid, scale_dtype))

    def round_trip(self, entries: Tensor, layer_idx: int, heads: int) -> Tensor:
        if type(self) is not PerToken:
            return super().round_trip(entries, layer_idx, heads)
        by_row = entries.flatten(0, 1)
        turned = self.rotate(by_row.float(), layer_idx)
        stored = round_trip(turned, self.bits, self.group, self.grid, torch_dtype(self.scale_dtype))
        return self.unrotate(stored.to(entries.dtype), layer_idx).view(entries.shape)

    def codes(self, encoded: Encoded) -> Codes | None:
        codes, scale, zero = as_quantized(encoded)
        if self.grid != "offset" or zero is None or scale.shape[-1] != 1:
            return None
        return Codes(codes, scale, zero, self.bits)

    def _decode(self, encoded: Encoded) -> Tensor:
        return dequantize(as_quantized(encoded), self.bits, encoded.head_dim, self.grid)


def scale_bytes(grid: Grid, scale_dtype: ScaleDtype) -> int:
    """Bytes of the scale and the zero of one group."""
    return (1 if grid == "symmetric" else 2) * torch_dtype(scale_dtype).itemsize


def as_tensors(quantized: Quantized) -> dict[str, Tensor]:
    """Codes, scale and, where there is one, zero."""
    return {name: tensor for name, tensor in quantized._asdict().items() if tensor is not None}


def as_quantized(encoded: Encoded) -> Quantized:
    """The reverse of `as_tensors`."""
    return Quantized(encoded.tensors["codes"], encoded.tensors["scale"], encoded.tensors.get("zero"))
