"""Pages of cache entries: channel-wise bounds of their keys, and upper bounds of query-key products.

Page p of a row holds its entries p * page_size … (p + 1) * page_size - 1, those of the segment first, then the tail's.
"""

from typing import Literal

import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.dispatch import Impl, implementation

GroupReduce = Literal["none", "mean", "max", "sum"]


def empty_bounds(like: Tensor, *shape: int) -> Tensor:
    """Bounds [..., 2, P, D] of pages without entries: lower bounds maximal, upper bounds minimal."""
    largest = torch.finfo(like.dtype).max  # finite, so that its product with a zero of the query is 0
    bounds = like.new_full(shape, largest)
    bounds[..., 1, :, :] = -largest
    return bounds


def page_bounds(
    entries: Ragged,
    first: Tensor,
    bounds: Tensor,
    page_size: int,
    slots: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Extend the bounds of pages to further keys, in place.

    Args:
        entries: R rows, of which the keys are read.
        first: [R] number of the first of these keys among the entries of its row.
        bounds: [R, 2, P, D], lower and upper; see `empty_bounds`.
        page_size: entries of a page.
        slots: [R, T] places of the entries in the pool, counted from the row's offset; None: they follow each other.
    """
    implementation("page_bounds", impl, ("reference", "triton"), entries.keys).page_bounds(
        entries, first, bounds, page_size, slots
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
