"""Spherical KV: the direction of a group of channels by a codebook, its length in eight bits."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, ScaleDtype, Source, check_choice, torch_dtype
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.ops.quantize import pack, packed_bytes, unpack

Tier = Literal["high", "mid", "low"]
_LEVELS = 127


class Spherical(Codec):
    """Keys before RoPE as directions and radii of groups of channels (Spherical KV); one tier of its codebooks.

    The direction is the word of the codebook with the largest cosine. Radii have 127 steps, with a scale per page of
    entries and group of channels. `SphericalTiers` says which entry belongs to which tier. Values are not coded by this
    method, and in its published budget not counted.

    Args:
        table: safetensors file with codebooks of unit words, [L, H, G, C, D / G], one per tier: `high`, `mid`, `low`; H
            = 1: all heads share them.
        tier: codebook in use; C words, a power of two up to 256.
        page: neighbouring entries of a row that share scales; 0: radii stay float32.
        scale_dtype: of the scales.
    """

    status = "numbers"
    table_argument = "table"
    before_rope = True

    def __init__(
        self,
        table: str,
        tier: Tier = "high",
        page: int = 128,
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        super().__init__()
        check_choice("tier", tier, Tier)
        check_choice("scale_dtype", scale_dtype, ScaleDtype)
        self._words = tensors.read(table, {tier: "LHGCD"})[tier]
        words = self._words.shape[3]
        if not 2 <= words <= 256 or words & (words - 1) or page < 0:
            raise UserError(f"page={page} table={table}: {words} words, expected a power of two from 2 to 256")
        if not float((self._words.norm(dim=-1) - 1).abs().max()) < 1e-3:
            raise UserError(f"table={table}: expected words of length 1")
        self.bits, self.page, self.scale_dtype = words.bit_length() - 1, page, scale_dtype

    @property
    def groups(self) -> int:
        """Groups of channels."""
        return self._words.shape[2]

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        if head_dim != self.groups * self._words.shape[4]:
            raise UserError(
                f"table=: codebooks of {self.groups * self._words.shape[4]} channels, heads have {head_dim}"
            )
        directions = sum(entries) * packed_bytes(self.groups, self.bits)
        if not self.page:
            return directions + sum(entries) * self.groups * 4
        pages = sum(self._pages(entries))
        return directions + self.groups * (sum(entries) + pages * torch_dtype(self.scale_dtype).itemsize)

    def _pages(self, entries: Sequence[int]) -> list[int]:
        return [-(-count // self.page) for count in entries]

    def _encode(self, source: Source) -> dict[str, Tensor]:
        vectors = source.entries.float().unflatten(-1, (self.groups, self._words.shape[4]))
        radii = torch.linalg.vector_norm(vectors, dim=-1)
        codes = [vectors[:0, :, 0].long()]
        for row, part in enumerate(vectors.split(list(source.lengths))):
            codes.append(torch.einsum("ngd,gcd->ngc", part, self._codebook(source.layer_idx, row, part)).argmax(-1))
        packed = pack(torch.cat(codes), self.bits)
        if not self.page:
            return {"codes": packed, "radii": radii}
        pages = self._page_of(source.lengths).to(radii.device)
        largest = radii.new_zeros(sum(self._pages(source.lengths)), self.groups)
        largest = largest.scatter_reduce(0, pages.unsqueeze(-1).expand_as(radii), radii, "amax")
        dtype = torch_dtype(self.scale_dtype)
        limits = torch.finfo(dtype)
        scale = (largest / _LEVELS).clamp(min=limits.smallest_normal * limits.eps).to(dtype)
        steps = (radii / scale.float()[pages]).round().clamp(max=_LEVELS)
        return {"codes": packed, "radii": steps.to(torch.uint8), "scale": scale}

    def _decode(self, encoded: Encoded) -> Tensor:
        codes = unpack(encoded.tensors["codes"], self.bits, self.groups).long()
        radii = encoded.tensors["radii"].float()
        if self.page:
            radii = radii * encoded.tensors["scale"].float()[self._page_of(encoded.entries).to(radii.device)]
        parts = [radii.new_zeros(0, self.groups, self._words.shape[4])]
        for row, part in enumerate(codes.split(list(encoded.entries))):
            words = self._codebook(encoded.layer_idx, row, radii)
            parts.append(words[torch.arange(self.groups, device=words.device), part])
        return (torch.cat(parts) * radii.unsqueeze(-1)).flatten(1)

    def _codebook(self, layer_idx: int, row: int, like: Tensor) -> Tensor:
        """Words [G, C, D / G] of a row."""
        layers, heads = self._words.shape[:2]
        if layer_idx >= layers:
            raise UserError(f"table=: codebooks of {layers} layers, got layer {layer_idx}")
        return self._words[layer_idx, row % heads].to(like.device)

    def _page_of(self, entries: Sequence[int]) -> Tensor:
        """[N] int64 page of every entry; pages begin with their row."""
        pages, first = [torch.zeros(0, dtype=torch.int64)], 0
        for count, of_row in zip(entries, self._pages(entries), strict=True):
            pages.append(first + torch.arange(count) // self.page)
            first += of_row
        return torch.cat(pages)
