"""Pages of cache entries: channel-wise bounds of their keys, and how large a query's product with one of them can be.

Page p of a row holds its entries p * page_size … (p + 1) * page_size - 1, those of the segment first, then the tail's.
"""

from typing import Literal

import torch
from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation

GroupReduce = Literal["none", "mean", "max", "sum"]


def empty_bounds(like: Tensor, *shape: int) -> Tensor:
    """Bounds [..., 2, P, D] of pages without entries: the lower ones as high, the upper ones as low as can be."""
    largest = torch.finfo(like.dtype).max  # finite, so that a channel which the query does not use counts as nothing
    bounds = like.new_full(shape, largest)
    bounds[..., 1, :, :] = -largest
    return bounds


def page_bounds(
    keys: Tensor,
    start: Tensor,
    length: Tensor,
    longest: int,
    first: Tensor,
    bounds: Tensor,
    page_size: int,
    slots: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Let the bounds of pages enclose further keys, in place.

    Args:
        keys: [N, D] pool; row r brings `keys[start[r] : start[r] + length[r]]`.
        start, length: [R].
        longest: upper bound of `length`, known on the host.
        first: [R] number among the entries of its row that the first of these keys has.
        bounds: [R, 2, P, D], lower and upper; see `empty_bounds`.
        page_size: entries of a page.
        slots: [R, T] where in the pool, from `start[r]` on, the entries lie; None: they follow each other.
    """
    implementation("page_bounds", impl, ("reference", "triton"), keys).page_bounds(
        keys, start, length, longest, first, bounds, page_size, slots
    )


def page_scores(
    query: Tensor,
    bounds: Tensor,
    pages: Tensor,
    group_reduce: GroupReduce = "none",
    *,
    impl: Impl = "auto",
) -> Tensor:
    """The largest product, not scaled, that a query can have with keys inside the bounds: sum of max(q low, q high).

    Args:
        query: [B, H*G, D]; query heads h*G .. h*G+G-1 read kv head h.
        bounds: [B*H, 2, P, D].
        pages: [B*H] pages of every row that hold entries.
        group_reduce: over the query heads of a kv head, or none.

    Returns:
        [B*H, P], or [B*H*G, P] where the heads are not reduced, float32; -inf for pages without entries.
    """
    scores: Tensor = implementation("page_bounds", impl, ("reference", "triton"), query, bounds).page_scores(
        query, bounds, pages, group_reduce
    )
    return scores
