"""Budgets in bytes: how many entries they hold at a precision, or what is shared out over entries."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.eviction import Rerotate
from learnkv.core.page_selector import PageSelector
from learnkv.core.precision import TABLE_BYTES, LevelPlan, Precision
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.policy.budget import check_budget

ByteCount = float | int | str
_UNITS = {"": 1, "B": 1, "KB": 2**10, "MB": 2**20, "GB": 2**30}
_EXPECTED = "expected a fraction of the 16-bit cache, above 0 and at most 1, or bytes of each prompt such as 64MB"


def parse_bytes(value: ByteCount) -> float | int:
    """A fraction (float, at most 1) of the keys and values of the prompt at 16 bits, or bytes (int) of each prompt.

    Numbers up to 1 are fractions; KB, MB and GB count 1,024 of the next smaller unit.

    Raises:
        UserError: for anything else.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:e-?\d+)?)\s*([KMG]?B?)\s*", str(value), re.IGNORECASE)
    if match is None or isinstance(value, bool) or (match[2] and match[2].upper() not in _UNITS):
        raise UserError(f"bytes={value}: {_EXPECTED}")
    number, unit = float(match[1]), match[2].upper()
    if unit == "" and 0 < number <= 1:
        return number
    count = math.floor(number * _UNITS[unit])
    if count < 1:
        raise UserError(f"bytes={value}: {_EXPECTED}")
    return count


def check_spend(
    keep: float | None, budget: float | None, byte_count: ByteCount | None, precision: Precision | None
) -> None:
    """Raise unless exactly one kind of budget is given, in range, that the precision can spend."""
    check_budget(keep, budget, byte_count)
    if byte_count is not None:
        parse_bytes(byte_count)
    elif precision is not None and precision.shares_bytes:
        raise UserError(
            f"keep={keep} budget={budget}: {precision.name} shares out bytes over entries and levels, expected bytes="
        )


def check_precision(
    precision: Precision | None,
    scorer: Scorer | None,
    evict_interval: int,
    pages: PageSelector | None,
    rerotate: Rerotate | None,
) -> None:
    """Raise UserError for what a policy cannot have together with entries in fewer bits."""
    if precision is None:
        return
    if pages is not None:
        raise UserError(f"pages={pages.name} precision={precision.label}: not supported together")
    if evict_interval and not precision.known_bytes:
        raise UserError(
            f"evict_interval={evict_interval} precision={precision.label}: expected one level, whose entries do not "
            "depend on each other"
        )
    if precision.shares_bytes and rerotate is not None:
        raise UserError(f"rerotate={rerotate}: expected none where entries differ in precision")
    if precision.shares_bytes and scorer is None:
        raise UserError(f"precision={precision.name}: expected a scorer, by which bytes are shared out")


def check_countable(
    byte_count: ByteCount, pages: PageSelector | None, decode: Scorer | None, rerotate: Rerotate | None
) -> None:
    """Raise UserError where a budget in bytes would not count everything that is held.

    Args:
        pages, rerotate: of the policy.
        decode: its scorer of decoded tokens, where it evicts again while they are added.
    """
    if pages is not None:
        raise UserError(f"bytes={byte_count}: expected a policy without pages, which frees nothing")
    if decode is not None and decode.decode_capture:
        raise UserError(f"bytes={byte_count}: {decode.name} holds statistics of every entry")
    if rerotate is not None:
        raise UserError(f"bytes={byte_count}: rerotate={rerotate} holds a second position of every entry")


@dataclass(frozen=True)
class ByteBudget:
    """What bytes hold at the levels of a precision.

    Args:
        precision: of what is kept.
        asked: bytes of each row.
        heads: kv heads per layer.
        head_dims: D of every layer.
        itemsize: bytes of a number as the model computes it.
    """

    precision: Precision
    asked: Sequence[int]
    heads: int
    head_dims: Sequence[int]
    itemsize: int

    @classmethod
    def of(cls, cache: CompressedCache, precision: Precision, byte_count: ByteCount) -> "ByteBudget":
        """The budget of a cache whose prompt is complete, or being read.

        Raises:
            UserError: for a head size that a codec does not have, or a model that the precision was not made for.
        """
        layers, parsed = cache.compressed_layers(), parse_bytes(byte_count)
        precision.check(len(layers), layers[0].heads)
        whole = [cache.narrow_token_nbytes() * n for n in cache.prompt_lengths]
        asked = [math.floor(parsed * row) if isinstance(parsed, float) else parsed for row in whole]
        dims = [channels for _, channels, _ in cache.layer_sizes()]
        return cls(precision, asked, layers[0].heads, dims, layers[0].dtype.itemsize)

    @functools.cached_property
    def tables(self) -> int:
        """Bytes of a row's tables, whatever is kept."""
        return self._tables(self.precision.used(self.head_dims))

    def _tables(self, used: Sequence[bool]) -> int:
        levels, heads = list(itertools.compress(self.precision.levels, used)), [0] * self.heads
        own = sum(level.nbytes(heads, dim, self.itemsize) for level in levels for dim in self.head_dims)
        return own + (0 if any(level.unchanged(self.itemsize) for level in levels) else TABLE_BYTES * self.heads)

    @property
    def entries(self) -> list[int]:
        """Bytes of each row without tables."""
        return [asked - self.tables for asked in self.asked]

    def totals(self, lengths: Sequence[int]) -> list[int]:
        """Entries that every row's bytes hold at the reference level, over all heads.

        Raises:
            UserError: for fewer than one per head.
        """
        level = self.precision.reference
        entry = max(level.entry_bytes(dim) for dim in self.head_dims)
        heads, totals = self.heads * len(self.head_dims), list[int]()
        for asked, of_entries, n in zip(self.asked, self.entries, lengths, strict=True):
            totals.append(min(max(of_entries, 0) // entry, n * heads))
            if totals[-1] < heads:
                raise UserError(
                    f"bytes={asked}: hold {max(of_entries, 0) / entry / heads:.2f} entries per head of {entry} bytes "
                    f"beside {self.tables} bytes of tables, expected at least one"
                )
        return totals

    def fitting(self, lengths: Sequence[int], split: Callable[[Sequence[int]], Tensor]) -> list[int]:
        """As `totals`, for a codec whose bytes depend on how the entries are split over heads, by bisection.

        Args:
            split: budgets [L, B, H] of totals [B].
        """
        heads = self.heads * len(self.head_dims)
        low, high = [heads] * len(lengths), [n * heads for n in lengths]
        self._check_fits(split(low))
        while any(below < above for below, above in zip(low, high, strict=True)):
            middle = [(below + above + 1) // 2 for below, above in zip(low, high, strict=True)]
            fits = [size <= asked for size, asked in zip(self.sizes(split(middle)), self.asked, strict=True)]
            low = [half if fit else below for half, fit, below in zip(middle, fits, low, strict=True)]
            high = [above if fit else half - 1 for half, fit, above in zip(middle, fits, high, strict=True)]
        return low

    def row_nbytes(self, plan: LevelPlan) -> list[int]:
        """Bytes of each row with a plan of independent levels."""
        entry = torch.tensor([[level.entry_bytes(dim) for dim in self.head_dims] for level in plan.levels])
        of_rows = (plan.counts.cpu() * entry[:, :, None, None]).sum((0, 1, 3))
        return (of_rows + self._tables(plan.used)).tolist()

    def _check_fits(self, budgets: Tensor) -> None:
        for size, asked in zip(self.sizes(budgets), self.asked, strict=True):
            if size > asked:
                raise UserError(f"bytes={asked}: one entry per head takes {size} bytes at {self.precision.label} bits")

    def sizes(self, budgets: Tensor) -> list[int]:
        """Bytes of each row with budgets [L, B, H] at the only level."""
        (level,) = self.precision.levels
        extra = 0 if level.unchanged(self.itemsize) else TABLE_BYTES * self.heads
        by_row = budgets.transpose(0, 1).tolist()
        return [
            extra
            + sum(level.nbytes(counts, dim, self.itemsize) for counts, dim in zip(row, self.head_dims, strict=True))
            for row in by_row
        ]


def uniform_levels(precision: Precision, budgets: Tensor, wanted: Tensor) -> LevelPlan:
    """All kept entries at the only level."""
    return LevelPlan(precision.levels, budgets.unsqueeze(0), wanted.unsqueeze(0), [True])


def shared_levels(
    spend: ByteBudget, ranking: Tensor | None, scores: Tensor, budgets: Tensor, unprotected: Tensor | None
) -> LevelPlan:
    """Levels of entries under one budget for each row, or under one for each head where budgets are not by rank.

    Args:
        spend: bytes of each row.
        ranking: [L, B, H, S] scores that are comparable over layers and heads; None: there are none.
        scores: [L, B, H, S] comparable within each head.
        budgets: [L, B, H] entries of each head at the reference level.
        unprotected: as `ranking`, or `scores` where that is None, with scores of protected entries.
    """
    precision, dims = spend.precision, spend.head_dims
    if ranking is not None:
        return precision.shares(ranking, torch.tensor(spend.entries), dims, unprotected)
    entry = torch.tensor([precision.reference.entry_bytes(dim) for dim in dims], device=budgets.device)
    return precision.shares(scores, budgets * entry.view(-1, 1, 1), dims, unprotected)
