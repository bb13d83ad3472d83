"""OSCAR: codes of two bits after a rotation that a model's own queries and values define."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.codecs.per_token import PerToken
from learnkv.codecs.turboquant import check_orthogonal
from learnkv.core.codec import ScaleDtype, Source, check_choice
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import locate

Part = Literal["keys", "values"]


class CovarianceRotation(PerToken):
    """Keys in the axes of the queries' covariance, values in those of their own, then codes (OSCAR, arXiv 2605.17757).

    `ops.covariance_rotation` makes the rotations, `learnkv calibrate` measures them. The largest numbers of an entry
    are clipped: those whose absolute value exceeds the one of rank floor(clip * D). Error bounds hold for the others.

    Args:
        table: safetensors file with rotations `keys` and `values` [L, H, D, D]; H = 1: all heads share them.
        part: what is stored.
        bits: of a code.
        clip: rank of the largest number that is kept, as a fraction; 0: nothing is clipped. None: 0.96 for keys, 0.92
            for values.
        group: channels with one scale and zero; None: all.
        scale_dtype: of scales and zeros.
    """

    status = "numbers"
    table_argument = "table"

    def __init__(
        self,
        table: str,
        part: Part = "keys",
        bits: int = 2,
        clip: float | None = None,
        group: int | None = None,
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        super().__init__(bits, "none", group, scale_dtype=scale_dtype)
        check_choice("part", part, Part)
        self.clip = {"keys": 0.96, "values": 0.92}[part] if clip is None else clip
        if not 0 <= self.clip <= 1:
            raise UserError(f"clip={clip}: expected a fraction from 0 to 1")
        self._table = tensors.read(
            locate(table, "covariance_rotation.safetensors"), {part: tensors.COVARIANCE_ROTATION[part]}
        )[part]
        check_orthogonal(self._table, f"table={table}")

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        layers, _, dim, _ = self._table.shape
        if layer_idx >= layers or dim != head_dim:
            raise UserError(
                f"table=: rotations of {layers} layers and {dim} channels, got layer {layer_idx} with {head_dim}"
            )
        return self._table[layer_idx].to(device)

    def _encode(self, source: Source) -> dict[str, Tensor]:
        return super()._encode(source._replace(entries=clipped(source.entries, self.clip)))


def clipped(entries: Tensor, clip: float) -> Tensor:
    """Entries [..., D], every one clipped to its absolute value of rank floor(clip * D); 0: unchanged."""
    dim = entries.shape[-1]
    if clip == 0:
        return entries
    limit = entries.abs().sort(-1).values[..., min(int(clip * dim), dim - 1)].unsqueeze(-1)
    return torch.minimum(torch.maximum(entries, -limit), limit)
