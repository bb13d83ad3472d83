"""Tiers: the kept entries of one layer that are stored at one level of precision."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnkv.cache.storage import Segment
from learnkv.core.codec import Codec, Encoded, Rows
from learnkv.core.precision import Level
from learnkv.ops.arguments import Tier


@dataclass(frozen=True)
class StoredTier:
    """Entries in position order within each row r = b * H + h; rows may alias."""

    level: Level
    keys: Encoded
    values: Encoded
    positions: Tensor
    """[N] int32."""
    offset: Tensor
    """[R] int32."""
    length: Tensor
    """[R] int32."""
    longest: int
    heads: int

    @classmethod
    def store(cls, level: Level, segment: Segment, layer_idx: int, heads: int, queries: Tensor) -> "StoredTier":
        """Encode the rows of a segment, whose pool holds nothing else.

        Args:
            queries: [B, H*G, W, D] last queries of the prompt, for codecs that need them.
        """
        rows = len(segment.offset)
        by_row = queries.reshape(rows, -1, *queries.shape[2:]) if queries.shape[2] else None
        entries = Rows(segment.offset, segment.length, layer_idx, by_row)
        keys = level.keys.encode(_narrow(level.keys, segment.keys), entries)
        values = level.values.encode(_narrow(level.values, segment.values), entries)
        offset, length = (table.to(torch.int32) for table in (segment.offset, segment.length))
        return cls(level, keys, values, segment.positions, offset, length, max(keys.entries, default=0), heads)

    def arguments(self, dtype: torch.dtype) -> Tier:
        """The tier as ops take it: codes, or decoded entries of `dtype`."""
        keys, values = (
            codec.codes(part) or codec.decode(part, dtype)
            for codec, part in ((self.level.keys, self.keys), (self.level.values, self.values))
        )
        return Tier(keys, values, self.offset, self.length, self.longest, *self._bases, self._spans)

    @functools.cached_property
    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        return self._basis(self.level.keys, self.keys), self._basis(self.level.values, self.values)

    def _basis(self, codec: Codec, part: Encoded) -> Tensor | None:
        basis = codec.basis(part.layer_idx, part.head_dim)
        if basis is None:
            return None
        basis = basis.to(self.offset.device)
        return basis if len(basis) == 1 else basis.repeat(len(self.offset) // len(basis), 1, 1)

    @functools.cached_property
    def _spans(self) -> Sequence[tuple[int, int]] | None:
        if self.offset.device.type != "cpu":
            return None
        return list(zip(self.offset.tolist(), self.length.tolist(), strict=True))

    def rows(self, batch: Tensor) -> "StoredTier":
        """The tier of batch rows `batch` [B'], sharing what is stored."""
        batch = batch.to(self.offset.device)
        offset, length = (table.view(-1, self.heads)[batch].flatten() for table in (self.offset, self.length))
        return replace(self, offset=offset, length=length)

    def row_nbytes(self) -> list[int]:
        """Bytes of every row's entries, positions and tables (host sync)."""
        dim = self.keys.head_dim
        return [self.level.nbytes([count], dim, itemsize=4) for count in self.length.tolist()]

    def row_positions(self, row: int) -> Tensor:
        """Ascending prompt positions [length] of one row (host sync)."""
        offset = int(self.offset[row])
        return self.positions[offset : offset + int(self.length[row])]

    def tensors(self) -> list[Tensor]:
        """All tensors of the tier."""
        return [
            *self.keys.tensors.values(),
            *self.values.tensors.values(),
            self.positions,
            self.offset,
            self.length,
        ]


def _narrow(codec: Codec, entries: Tensor) -> Tensor:
    """Entries of 16 bits for codecs that store some of them as they are."""
    wide = not codec.independent and entries.element_size() > 2
    return entries.to(torch.float16) if wide else entries
