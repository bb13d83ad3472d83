"""Rows of a pool as the host knows them, and which of them one strided view reads."""

import functools
from typing import NamedTuple

from torch import Tensor


class RowView(NamedTuple):
    """Neighbouring rows of one length at equal distances."""

    first: int
    rows: int
    offset: int
    distance: int
    """From row to row."""
    length: int

    def of(self, pool: Tensor) -> Tensor:
        """[rows, length, D] of the pool [N, D], not copied."""
        entry, channel = pool.stride()
        return pool.as_strided(
            (self.rows, self.length, pool.shape[1]), (self.distance * entry, entry, channel), self._begin(pool)
        )

    def of_heads(self, pool: Tensor, heads: int) -> Tensor:
        """As `of`, the rows of every prompt apart: [rows / heads, heads, length, D]."""
        entry, channel = pool.stride()
        row = self.distance * entry
        return pool.as_strided(
            (self.rows // heads, heads, self.length, pool.shape[1]),
            (heads * row, row, entry, channel),
            self._begin(pool),
        )

    def _begin(self, pool: Tensor) -> int:
        return int(pool.storage_offset()) + self.offset * pool.stride(0)


class Spans(tuple[tuple[int, int], ...]):
    """(offset, length) of every row. What steps derive from them is computed once."""

    @functools.cached_property
    def longest(self) -> int:
        """Entries of the longest row."""
        return max((length for _, length in self), default=0)

    @functools.cached_property
    def views(self) -> tuple[RowView, ...]:
        """All rows in order, in as few views as read them."""
        views, first = [], 0
        while first < len(self):
            offset, length = self[first]
            distance = max(self[first + 1][0] - offset, 0) if first + 1 < len(self) else 0
            rows = 1
            while first + rows < len(self) and self[first + rows] == (offset + rows * distance, length):
                rows += 1
            views.append(RowView(first, rows, offset, distance, length))
            first += rows
        return tuple(views)
