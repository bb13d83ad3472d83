"""Compaction of the kept entries of one layer into the pool."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation


class Rerotation(NamedTuple):
    """Consecutive positions for the kept entries of every row: keys are rotated from where they stood to there.

    Keys carry RoPE that rotates channel i against channel i + F, for the first 2F channels.
    """

    positions: Tensor
    """[N] prompt position of every entry of the pool."""
    first: Tensor
    """[R] position that the first entry of a row gets: 0, or whatever makes the row end where the prompt does."""
    frequencies: Tensor
    """[F] float32 radians per position."""


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    start: Tensor,
    length: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    rerotation: Rerotation | None = None,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    impl: Impl = "auto",
) -> None:
    """Write the selected keys and values of R rows into their segments of the pool.

    Args:
        keys, values: [R, S, D].
        index: [N] int64 result of `select` over all rows of the pool (`row * S + slot`).
        first_row: number of this layer's first row in `index`.
        start, length: [R] where the segments of these rows lie in the pool; the rows of a layer are contiguous.
        out_keys, out_values: [N, D], written in place.
        rerotation: positions that the keys are rotated to; None: they keep their own.
        spans: (start, length) of every row where the host knows them. Kernels do not ask; without them the reference
            reads both tables, which is a host sync on a GPU.
    """
    implementation("gather_kv", impl, ("reference", "triton"), keys, values).gather_kv(
        keys, values, index, first_row, start, length, out_keys, out_values, rerotation, spans
    )
