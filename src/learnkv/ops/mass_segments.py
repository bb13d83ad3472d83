"""Segments of a sequence that hold about the same mass, and how many entries of each are kept; no host sync."""

import torch
from torch import Tensor

from learnkv.ops.device import upload

_BITS = 31  # of the number of rounds in which budgets change by one


def mass_segments(mass: Tensor, entries: Tensor, step: float, shortest: int, longest: int) -> Tensor:
    """Bounds [..., K + 1] of consecutive segments that cover the entries; empty ones come last.

    A segment ends before the entry with which the cumulative mass reaches a multiple of `step`. Segments longer than
    `longest` are split first; then one shorter than `shortest` takes in the next, so that only the last may be shorter.

    Args:
        mass: [..., T] non-negative, with sum 1, 0 from `entries` on.
        entries: [...] int64 number of entries.
        step: mass of a segment, 0 < step.
        shortest, longest: entries of a segment.
    """
    slots, device, ends = mass.shape[-1], mass.device, entries.unsqueeze(-1)
    steps = [number * step for number in range(1, int(1 / step) + 1) if number * step < 1]
    marks = upload(steps, device, torch.float64).to(mass.dtype).expand(*mass.shape[:-1], -1).contiguous()
    cuts = torch.searchsorted(mass.cumsum(-1), marks).clamp(min=1).minimum((ends - 1).clamp(min=1))
    begins = torch.zeros(*mass.shape[:-1], slots + 1, dtype=torch.bool, device=device).scatter_(-1, cuts, True)
    begins, number = begins[..., :slots], torch.arange(slots, device=device)
    first = number.where(begins, 0).cummax(-1).values
    pieces = ((number - first) % longest == 0) & (number < ends)
    following = torch.cat([number.where(pieces, ends), ends], -1).flip(-1).cummin(-1).values.flip(-1)
    bounds = [torch.zeros_like(ends)]
    for _ in range(min(len(steps) + 1 + slots // longest, -(-slots // shortest))):
        bounds.append(following.gather(-1, (bounds[-1] + shortest).clamp(max=slots)))
    return torch.cat(bounds, -1)


def segment_budgets(lengths: Tensor, masses: Tensor, total: Tensor, least: int) -> Tensor:
    """Entries [..., K] to keep of each segment, `total` of them, in proportion to their masses beside `least` of each.

    Where `least` of each is too much, segments give up entries one by one in turn, down to one each; where even that is
    too much, those of the least mass give up theirs.

    Args:
        lengths: [..., K] int64 entries of the segments, with a sum of `total` or more; 0 where there is no segment.
        masses: [..., K] float64, of the segments.
        total: [...] int64 entries to keep.
        least: entries of each segment that are kept where there is room.
    """
    total = total.unsqueeze(-1)
    budgets = lengths.clamp(max=least)
    rest, whole = total - budgets.sum(-1, keepdim=True), masses.sum(-1, keepdim=True)
    shares = (rest * masses / whole).where((rest > 0) & (whole > 0), 0.0)
    budgets = (budgets + shares.round().long()).minimum(lengths)
    grows = budgets.sum(-1, keepdim=True) < total
    lowest = budgets.clamp(max=1)

    def after(rounds: Tensor) -> Tensor:
        """Budgets after each segment with room has changed by one entry, that many times."""
        return (budgets + rounds).minimum(lengths).where(grows, (budgets - rounds).maximum(lowest))

    rounds = torch.zeros_like(total)
    for bit in reversed(range(_BITS)):
        apart = after(rounds + 2**bit).sum(-1, keepdim=True) - total
        rounds = rounds + 2**bit * (apart * torch.where(grows, 1, -1) <= 0)
    full = after(rounds)
    apart = total - full.sum(-1, keepdim=True)
    room = torch.where(grows, full < lengths, full > 1)
    budgets = full + apart.sign() * (room & (room.cumsum(-1) <= apart.abs()))
    return budgets.where(budgets.sum(-1, keepdim=True) <= total, _heaviest(masses, lengths > 0, total))


def _heaviest(masses: Tensor, present: Tensor, total: Tensor) -> Tensor:
    """One entry of each of the `total` [..., 1] segments of most mass, the earlier of equal ones."""
    order = masses.masked_fill(~present, -1.0).argsort(dim=-1, descending=True, stable=True)
    number = torch.arange(masses.shape[-1], device=masses.device)
    return torch.zeros_like(order).scatter_(-1, order, (number < total).long())
