"""Compaction of the kept entries of one layer into the pool."""

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    start: Tensor,
    length: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    *,
    impl: Impl = "auto",
) -> None:
    """Write the selected keys and values of R rows into their segments of the pool.

    Args:
        keys, values: [R, S, D].
        index: [N] int64 result of `select` over all rows of the pool (`row * S + slot`).
        first_row: number of this layer's first row in `index`.
        start, length: [R] where the segments of these rows lie in the pool; the rows of a layer are contiguous.
        out_keys, out_values: [N, D], written in place.
    """
    implementation("gather_kv", impl, ("reference", "triton"), keys, values).gather_kv(
        keys, values, index, first_row, start, length, out_keys, out_values
    )
