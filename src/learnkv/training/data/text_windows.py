"""Token windows of a text, by random access or from a stream."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from learnkv.errors import UserError


class Text(ABC):
    """A text as token ids."""

    @abstractmethod
    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        """`tokens` consecutive ids that begin as prompts do; a function of the generator's state and of `row`."""


class Pool(Text):
    """A text in memory, read from random positions.

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
        start = rng.randrange(len(self.ids) - body + 1)
        window: list[int] = self.ids[start : start + body].tolist()
        return self.head + window


class Windows(Text):
    """Random windows of a data set with the column "input_ids".

    Args:
        rows: a map-style data set.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        ids: list[int] = self.rows[rng.randrange(len(self.rows))]["input_ids"][:tokens].tolist()
        return ids


class Stream(Text):
    """Windows of a streamed data set in its own order, repeated without end: row `row` is number `first + row`.

    A row before the last one read restarts the stream.

    Args:
        rows: an iterable-style data set with the column "input_ids".
        first: number of skipped rows.
        count: rows per repetition; None: all.
    """

    def __init__(self, rows: Any, first: int = 0, count: int | None = None) -> None:
        self.rows = rows.skip(first)
        self.rows = self.rows if count is None else self.rows.take(count)
        self._iterator: Iterator[Any] | None = None
        self._next_row = 0

    def read(self, rng: random.Random, row: int, tokens: int) -> list[int]:
        if self._iterator is None or row < self._next_row:
            self._iterator, self._next_row = self._endless(), 0
        window = next(islice(self._iterator, row - self._next_row, None))
        self._next_row = row + 1
        ids: list[int] = window["input_ids"][:tokens].tolist()
        return ids

    def _endless(self) -> Iterator[Any]:
        while True:
            empty = True
            for row in self.rows:
                empty = False
                yield row
            if empty:
                raise UserError("text: the data set has no window of the requested length")
