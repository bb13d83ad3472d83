"""Codes per channel: a scale and a zero for a channel of neighbouring entries."""

from collections.abc import Sequence

from torch import Tensor

from learnkv.codecs.per_token import PerToken, Rotation, as_quantized, as_tensors, scale_bytes
from learnkv.core.codec import Encoded, ScaleDtype, Source, torch_dtype
from learnkv.errors import UserError
from learnkv.ops.arguments import Codes
from learnkv.ops.hadamard import check_hadamard
from learnkv.ops.quantize import Grid, dequantize, packed_bytes, quantize


class PerChannel(PerToken):
    """Codes with a scale and a zero for every channel of `group` neighbouring entries of a row.

    Keys have channels of large numbers; a scale of their own keeps these from the others. Groups lie inside a row and
    are formed of the entries that are kept: what is encoded cannot be evicted entry by entry. Rows hold whole groups
    only; `PartlyExact` leaves the others at full precision.

    Args:
        bits: of a code.
        group: neighbouring entries that share scales.
        rotation: of the channels before they are rounded.
        grid: see `ops.quantize`.
        scale_dtype: of scales and zeros.
    """

    independent = False

    def __init__(
        self,
        bits: int = 2,
        group: int = 32,
        rotation: Rotation = "none",
        grid: Grid = "offset",
        scale_dtype: ScaleDtype = "float16",
    ) -> None:
        super().__init__(bits, rotation, None, grid, scale_dtype)
        if group < 1:
            raise UserError(f"group={group}: expected at least one entry")
        self.entries_per_group = group

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        if self.rotation == "hadamard":
            check_hadamard(head_dim)
        per_channel = packed_bytes(self.entries_per_group, self.bits) + scale_bytes(self.grid, self.scale_dtype)
        return self._groups(entries) * head_dim * per_channel

    def codes(self, encoded: Encoded) -> Codes | None:
        return None

    def _groups(self, entries: Sequence[int]) -> int:
        group = self.entries_per_group
        if any(count % group for count in entries):
            raise UserError(f"{self.name}: rows of {list(entries)} entries, expected whole groups of {group}")
        return sum(entries) // group

    def _encode(self, source: Source) -> dict[str, Tensor]:
        by_group = source.entries.unflatten(0, (self._groups(source.lengths), self.entries_per_group))
        channels = by_group.transpose(1, 2)
        return as_tensors(quantize(channels, self.bits, None, self.grid, torch_dtype(self.scale_dtype)))

    def _decode(self, encoded: Encoded) -> Tensor:
        channels = dequantize(as_quantized(encoded), self.bits, self.entries_per_group, self.grid)
        return channels.transpose(1, 2).flatten(0, 1)
