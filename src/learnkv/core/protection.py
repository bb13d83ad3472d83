"""Spans of a prompt that every policy keeps, beside the first and the most recent tokens."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Span = tuple[int, int]
"""First token and the token after the last, counted without padding."""


class Protection(NamedTuple):
    """Protected spans of the rows of a batch.

    A NamedTuple of plain values, so that it travels with a batch to workers and devices.
    """

    spans: tuple[tuple[Span, ...], ...]
    """Of each row: always kept; a budget below them is refused."""
    after_anchors: tuple[tuple[Span, ...], ...]
    """Of each row, in the order in which they are protected until their share of the budget is used up."""
    share: float = 0.5
    """Most of the entries per head that spans after anchors protect, as a fraction of the row's budget."""

    def rows(self, rows: Iterable[int]) -> "Protection":
        """The same for some rows of the batch."""
        chosen = list(rows)
        return Protection(
            tuple(self.spans[row] for row in chosen), tuple(self.after_anchors[row] for row in chosen), self.share
        )


def tokens_in(spans: Sequence[Span]) -> int:
    """Number of different tokens in spans."""
    return len({token for begin, end in spans for token in range(begin, end)})
