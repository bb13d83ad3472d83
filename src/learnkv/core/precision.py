"""Precision: in how many bits the keys and values of kept entries are stored."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from learnkv.core.codec import Codec
from learnkv.core.component import Component

POSITION_BYTES = 4
"""Bytes of an entry's prompt position."""
TABLE_BYTES = 8
"""Bytes of where a head's entries of one level begin, and how many they are."""
WIDE_TABLE_BYTES = 16
"""The same for entries that are stored as the model computed them."""


class Level(NamedTuple):
    """How the key and the value of an entry are stored."""

    keys: Codec
    values: Codec

    @property
    def independent(self) -> bool:
        """Whether entries are stored without regard to others, in equally many bytes each."""
        return self.keys.independent and self.values.independent

    def unchanged(self, itemsize: int) -> bool:
        """Whether entries whose numbers have `itemsize` bytes are stored as they are."""
        return itemsize <= 2 and self.keys.unchanged and self.values.unchanged

    def bits(self, head_dim: int) -> float:
        """Bits per number of an entry's key and value, codes with their scales."""
        return 8 * (self.keys.nbytes([1], head_dim) + self.values.nbytes([1], head_dim)) / (2 * head_dim)

    def entry_bytes(self, head_dim: int) -> int:
        """Bytes of one more entry of a head: its key, value and position."""
        return self.keys.nbytes([1], head_dim) + self.values.nbytes([1], head_dim) + POSITION_BYTES

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int) -> int:
        """Bytes of heads with these numbers of entries, each with its table."""
        table = WIDE_TABLE_BYTES if self.unchanged(itemsize) else TABLE_BYTES
        stored = self.keys.nbytes(entries, head_dim) + self.values.nbytes(entries, head_dim)
        return stored + sum(entries) * POSITION_BYTES + len(entries) * table


class LevelPlan(NamedTuple):
    """How many entries of each head are stored at each of M levels; the best kept ones at the highest level."""

    levels: Sequence[Level]
    """M, in the order of their bytes."""
    counts: Tensor
    """[M, L, B, H] int64, exact."""
    at_least: Tensor
    """[M, L, B, H] float64, differentiable: entries of this level or a higher one."""
    used: Sequence[bool]
    """M: whether entries may be stored at a level; tables exist of these only."""
    order: Tensor | None = None
    """[L, B, H, S] scores by which kept entries get their levels; None: those by which they are kept, where all that
    are protected come first."""


class Precision(Component, ABC):
    """The levels at which entries may be stored.

    A precision with one level stores all kept entries alike, whatever decides which these are. One with several shares
    out bytes: which entries are kept and at which level are decided together, by `learned` parameters.
    """

    label: str
    """In tables, such as 4, K4V3 or learned."""
    raw_scores: bool = False
    """Whether utilities are the scores themselves, not made comparable over heads."""

    @property
    @abstractmethod
    def levels(self) -> Sequence[Level]:
        """In the order of their bytes."""

    @property
    def reference(self) -> Level:
        """The level in whose bytes budgets per head and protected entries are counted."""
        return self.levels[0]

    @property
    def shares_bytes(self) -> bool:
        """Whether entries may differ in precision."""
        return len(self.levels) > 1

    @property
    def query_window(self) -> int:
        """Last queries of the prompt that the codecs read."""
        return max(codec.query_window for level in self.levels for codec in level)

    def check(self, layers: int, heads: int) -> None:
        """Raise UserError for a model of L layers and H kv heads that the precision was not made for."""

    def used(self, head_dims: Sequence[int]) -> list[bool]:
        """Whether some head may store entries at a level, for every level; `head_dims` D of each layer."""
        return [True] * len(self.levels)

    @property
    def known_bytes(self) -> bool:
        """Whether the bytes of an entry are known before anything is kept."""
        return not self.shares_bytes and self.reference.independent

    def shares(
        self, scores: Tensor, budget: Tensor, head_dims: Sequence[int], unprotected: Tensor | None = None
    ) -> LevelPlan:
        """How many entries of every head are stored at each level, for a precision that shares out bytes.

        Args:
            scores: [L, B, H, S] comparable within whatever shares a budget; +inf protected, -inf no entry.
            budget: [B] bytes of the entries of each row, or [L, B, H] of each head, tables not counted.
            head_dims: D of each layer.
            unprotected: the same with scores of protected entries, which decide their levels; None: protected entries
                get the best level of their head.
        """
        raise NotImplementedError(f"{self.name} has one level")
