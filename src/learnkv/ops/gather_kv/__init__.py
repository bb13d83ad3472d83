"""Copies the kept entries of one layer into the pool."""

from typing import NamedTuple

from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.rotary import Layout


class Rerotation(NamedTuple):
    """Consecutive positions for the kept entries of every row: keys are rotated from their positions to these."""

    positions: Tensor
    """[N] position that every entry of the pool is rotated to so far."""
    first: Tensor
    """[R] position that the first entry of a row gets: 0, or the one with which the row ends where the prompt does."""
    frequencies: Tensor
    """[F] float32 radians per position."""
    layout: Layout
    """The F pairs of channels that are rotated."""


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    out: Ragged,
    rerotation: Rerotation | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Write the selected keys and values of R rows into their segments of the pool.

    Args:
        keys, values: [R, S, D].
        index: [N] int64 result of `select` over all rows of the pool (`row * S + slot`).
        first_row: number of this layer's first row in `index`.
        out: R segments, which are contiguous in the pool; keys and values are written in place.
        rerotation: positions that the keys are rotated to; None: they keep their own.
    """
    implementation("gather_kv", impl, ("reference", "triton"), keys, values).gather_kv(
        keys, values, index, first_row, out, rerotation
    )
