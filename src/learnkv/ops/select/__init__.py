"""Exact top-k over ragged rows."""

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation


def select(scores: Tensor, budget: Tensor, total: int, *, impl: Impl = "auto") -> Tensor:
    """The `budget[r]` highest entries of every row, ties to the lower slot, with no host sync.

    Args:
        scores: [R, S] float32; -inf where there is no entry, +inf for protected entries.
        budget: [R] int64, at most the number of entries of the row.
        total: sum of `budget`, known on the host.

    Returns:
        [total] int64 flat indices `row * S + slot`: rows in order, slots ascending within a row.
    """
    chosen: Tensor = implementation("select", impl, ("reference", "triton"), scores.detach()).select(
        scores, budget, total
    )
    return chosen


def select_slots(scores: Tensor, budget: Tensor, most: int, *, impl: Impl = "auto") -> Tensor:
    """As `select`, for short rows and budgets that are on the device only: a list of fixed size for every row.

    Args:
        scores: [R, S] float32; -inf where there is no entry.
        budget: [R] integers; a row with fewer entries keeps them all.
        most: upper bound of `budget`, known on the host.

    Returns:
        [R, most] int32 slots, ascending within a row, then -1 where the row keeps fewer.
    """
    chosen: Tensor = implementation("select", impl, ("reference", "triton"), scores.detach()).select_slots(
        scores, budget, most
    )
    return chosen
