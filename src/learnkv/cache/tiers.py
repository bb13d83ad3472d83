"""Tiers: the kept entries of one layer that are stored at one level of precision."""

import functools
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.cache.storage import Segment
from learnkv.core.codec import Codec, Encoded, Rows
from learnkv.core.precision import Level
from learnkv.ops.arguments import Tier
from learnkv.ops.spans import Spans


class Carried(NamedTuple):
    """Entries of a merged prompt that are stored already: their codes move, so that each is rounded once."""

    tier: "StoredTier"
    places: Tensor
    """Place of every entry in the tier; -1: it is not stored yet."""


@dataclass(frozen=True)
class StoredTier:
    """Entries in position order within each row r = b * H + h; rows may alias."""

    level: Level
    keys: Encoded
    values: Encoded
    entries: Segment
    """Tables (int32), positions and statistics of the rows; its pools are empty."""
    heads: int

    @classmethod
    def store(
        cls, level: Level, segment: Segment, layer_idx: int, heads: int, queries: Tensor, carried: Carried | None = None
    ) -> "StoredTier":
        """Encode the rows of a segment, whose pool holds nothing else.

        Args:
            queries: [B, H*G, W, D] last queries of the prompt, for codecs that need them.
            carried: which of the N entries are stored already.
        """
        count = len(segment.offset)
        by_row = queries.reshape(count, -1, *queries.shape[2:]) if queries.shape[2] else None
        entries = Rows(segment.offset, segment.length, layer_idx, by_row)
        keys = level.keys.encode(_narrow(level.keys, segment.keys), entries)
        values = level.values.encode(_narrow(level.values, segment.values), entries)
        if carried is not None:
            _move(carried.tier.keys, keys, carried.places)
            _move(carried.tier.values, values, carried.places)
        offset, length = (table.to(torch.int32) for table in (segment.offset, segment.length))
        nothing, longest = segment.keys.new_empty(0, segment.keys.shape[-1]), max(keys.entries, default=0)
        rows = replace(segment, keys=nothing, values=nothing, offset=offset, length=length, longest=longest)
        return cls(level, keys, values, rows, heads)

    def arguments(self, dtype: torch.dtype) -> Tier:
        """The tier as ops take it: codes, or decoded entries of `dtype`."""
        keys, values = (
            codec.codes(part) or codec.decode(part, dtype)
            for codec, part in ((self.level.keys, self.keys), (self.level.values, self.values))
        )
        rows = self.entries
        return Tier(keys, values, rows.offset, rows.length, rows.longest, *self._bases, self._spans)

    def decoded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [N, D] in the model's own basis; of codecs that rotate all heads alike."""
        parts = ((self.level.keys, self.keys), (self.level.values, self.values))
        keys, values = (codec.unrotate(codec.decode(part)[None], part.layer_idx)[0].to(dtype) for codec, part in parts)
        return keys, values

    @functools.cached_property
    def _bases(self) -> tuple[Tensor | None, Tensor | None]:
        return self._basis(self.level.keys, self.keys), self._basis(self.level.values, self.values)

    def _basis(self, codec: Codec, part: Encoded) -> Tensor | None:
        basis = codec.basis(part.layer_idx, part.head_dim, self.entries.offset.device)
        if basis is None or len(basis) == 1:
            return basis
        return basis.repeat(len(self.entries.offset) // len(basis), 1, 1)

    @functools.cached_property
    def _spans(self) -> Spans | None:
        return self.entries.ragged.spans

    def rows(self, batch: Tensor) -> "StoredTier":
        """The tier of batch rows `batch` [B'], sharing what is stored."""
        return replace(self, entries=self.entries.rows(batch, self.heads))

    def row_nbytes(self) -> list[int]:
        """Bytes of every row's entries, positions and tables (host sync)."""
        dim, extra = self.keys.head_dim, self.entries.extra_nbytes
        counts = self.entries.length.tolist()
        return [self.level.nbytes([count], dim, itemsize=4) + count * extra for count in counts]

    def row_positions(self, row: int) -> Tensor:
        """Ascending prompt positions [length] of one row (host sync)."""
        return self.entries.row_positions(row)

    def tensors(self) -> list[Tensor]:
        """All tensors of the tier."""
        return [*self.keys.tensors.values(), *self.values.tensors.values(), *self.entries.tensors()]


def _move(source: Encoded, target: Encoded, index: Tensor) -> None:
    """Copy the entries of a tier to their places [N] in another one; -1: a new entry stays."""
    old = index >= 0
    for name, tensor in target.tensors.items():
        tensor[old] = source.tensors[name][index[old]]


def _narrow(codec: Codec, entries: Tensor) -> Tensor:
    """Entries of 16 bits for codecs that store some of them as they are."""
    wide = not codec.independent and entries.element_size() > 2
    return entries.to(torch.float16) if wide else entries
