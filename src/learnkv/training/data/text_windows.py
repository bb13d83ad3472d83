"""Token windows of a text, by random access or from a stream."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from learnkv.errors import UserError


class Text(ABC):
    """Gives consecutive token ids of a text."""

    @abstractmethod
    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        """`tokens` consecutive ids, beginning as prompts begin; a function of the generator's state and of `row`."""


class Pool(Text):
    """A text that fits into memory, read from random places.

    Args:
        ids: [N] token ids.
        head: ids that every prompt begins with.
    """

    def __init__(self, ids: Tensor, head: list[int]) -> None:
        self.ids, self.head = ids, head

    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        body = tokens - len(self.head)
        if body > len(self.ids):
            raise UserError(f"lengths: contexts and continuations of {tokens} tokens need a text longer than that")
        at = rng.randrange(len(self.ids) - body + 1)
        found: list[int] = self.ids[at : at + body].tolist()
        return self.head + found


class Windows(Text):
    """Random windows of a data set with the column "input_ids".

    Args:
        rows: a map-style data set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        found: list[int] = self.rows[rng.randrange(len(self.rows))]["input_ids"][:tokens].tolist()
        return found


class Stream(Text):
    """Windows of a streamed data set in its own order: row `row` is its `first + row`-th, over and over again.

    Rows are asked for in ascending order, or else the stream is read from its beginning again.

    Args:
        rows: an iterable-style data set with the column "input_ids".
        first: rows left out at the beginning.
        count: rows that are read before starting over; None: all.
    """

    def __init__(self, rows: Any, first: int = 0, count: int | None = None) -> None:
        self.rows = rows.skip(first)
        self.rows = self.rows if count is None else self.rows.take(count)
        self.open: Iterator[Any] | None = None
        self.next_row = 0

    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        if self.open is None or row < self.next_row:
            self.open, self.next_row = self._endless(), 0
        window = next(islice(self.open, row - self.next_row, None))
        self.next_row = row + 1
        found: list[int] = window["input_ids"][:tokens].tolist()
        return found

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty:
                raise UserError("text: the data set has no window of the length asked for")
