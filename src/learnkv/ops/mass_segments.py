"""Segments of a sequence that hold about the same mass, and how many entries of each are kept."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def mass_segments(mass: Tensor, step: float, shortest: int, longest: int) -> list[tuple[int, int]]:
    """Begin and end of consecutive segments that cover the T entries.

    A segment ends before the entry with which the cumulative mass reaches a multiple of `step`. Segments longer than
    `longest` are split first; then one shorter than `shortest` takes in the next, so that only the last may be shorter.

    Args:
        mass: [T] non-negative, with sum 1.
        step: mass of a segment, 0 < step.
        shortest, longest: entries of a segment.
    """
    entries = len(mass)
    marks = torch.arange(1, int(1 / step) + 1, device=mass.device, dtype=torch.float64) * step
    marks = marks[marks < 1].to(mass.dtype)
    cuts = torch.searchsorted(mass.cumsum(0), marks).clamp(1, max(entries - 1, 1)).unique().tolist()
    bounds = [0, *(cut for cut in cuts if cut < entries), entries]
    pieces = [
        (begin, min(begin + longest, last))
        for first, last in itertools.pairwise(bounds)
        for begin in range(first, last, longest)
    ]
    merged: list[tuple[int, int]] = []
    for begin, end in pieces:
        if merged and merged[-1][1] - merged[-1][0] < shortest:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def segment_budgets(lengths: Sequence[int], masses: Sequence[float], total: int, least: int) -> list[int]:
    """Entries to keep of each segment, `total` of them exactly, in proportion to their masses beside `least` of each.

    Where `least` of each is too much, segments give up entries one by one in turn, down to one each; where even that is
    too much, those of the least mass give up theirs.

    Args:
        lengths: entries of the segments, with a sum of `total` or more.
        masses: of the segments.
        total: entries to keep.
        least: entries of each segment that are kept where there is room.
    """
    budgets = [min(length, least) for length in lengths]
    rest = total - sum(budgets)
    if rest > 0:
        whole = sum(masses)
        shares = [rest * mass / whole if whole > 0 else 0.0 for mass in masses]
        budgets = [min(b + round(share), n) for b, share, n in zip(budgets, shares, lengths, strict=True)]
    while (apart := total - sum(budgets)) != 0:
        room = [index for index, budget in enumerate(budgets) if (budget < lengths[index] if apart > 0 else budget > 1)]
        if not room:  # more segments than entries to keep
            return _heaviest(masses, total)
        for index in room[: abs(apart)]:
            budgets[index] += 1 if apart > 0 else -1
    return budgets


def _heaviest(masses: Sequence[float], total: int) -> list[int]:
    """One entry of each of the `total` segments of most mass, the earlier of equal ones."""
    order = sorted(range(len(masses)), key=lambda index: -masses[index])[:total]
    return [int(index in order) for index in range(len(masses))]
