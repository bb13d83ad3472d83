"""Floating point numbers of eight bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, ScaleDtype, Source, check_choice, torch_dtype

LARGEST = 448.0  # of e4m3


class FP8(Codec):
    """Numbers of type e4m3 (arXiv 2209.05433) with a scale per entry: its largest number becomes 448.

    Relative error at most 2^-4, absolute at most scale * 2^-10 below scale * 2^-6.

    Args:
        scale_dtype: of the scales.
    """

    independent = True

    def __init__(self, scale_dtype: ScaleDtype = "float16") -> None:
        super().__init__()
        check_choice("scale_dtype", scale_dtype, ScaleDtype)
        self.scale_dtype = scale_dtype

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        return sum(entries) * (head_dim + torch_dtype(self.scale_dtype).itemsize)

    def _encode(self, source: Source) -> dict[str, Tensor]:
        entries, dtype = source.entries.float(), torch_dtype(self.scale_dtype)
        limits = torch.finfo(dtype)
        scale = entries.abs().amax(-1) / LARGEST
        # Rounded up: above 448 the type has NaN only.
        scale = (scale * (1 + limits.eps) + limits.smallest_normal * limits.eps).to(dtype)
        codes = (entries / scale.float().unsqueeze(-1)).to(torch.float8_e4m3fn)
        return {"codes": codes, "scale": scale}

    def _decode(self, encoded: Encoded) -> Tensor:
        return encoded.tensors["codes"].float() * encoded.tensors["scale"].float().unsqueeze(-1)
