"""Arguments that several attention ops share: ragged segments, tails and page lists."""

from typing import NamedTuple

from torch import Tensor

from learnkv.ops.spans import Spans


class Ragged(NamedTuple):
    """Rows of unequal length in one pool: row r = b * H + h owns `keys[offset[r] : offset[r] + length[r]]`.

    Rows may share entries (beams, forks).
    """

    keys: Tensor
    """[N, D]."""
    values: Tensor
    """[N, D]."""
    offset: Tensor
    """[R] int64."""
    length: Tensor
    """[R] int64."""
    longest: int
    """Upper bound of `length`, known on the host."""
    spans: Spans | None = None
    """(offset, length) of every row where the host knows them. Kernels do not need them; without them references read
    both tables, which is a host sync on a GPU."""

    def host_spans(self) -> Spans:
        """(offset, length) of every row; a host sync where the host does not know them."""
        if self.spans is not None:
            return self.spans
        return Spans(zip(self.offset.tolist(), self.length.tolist(), strict=True))


class Codes(NamedTuple):
    """Vectors [N, D] as codes per vector, which `ops.quantize` packs: x = code * scale + zero, in float32."""

    codes: Tensor
    """[N, W] uint8."""
    scale: Tensor
    """[N, 1]."""
    zero: Tensor
    """[N, 1]."""
    bits: int


class Tier(NamedTuple):
    """Rows as of `Ragged` whose keys and values are stored in fewer bits, rotated where their channels are."""

    keys: Codes | Tensor
    """Codes, or [N, D] where another codec has decoded them."""
    values: Codes | Tensor
    offset: Tensor
    """[R] int32."""
    length: Tensor
    """[R] int32."""
    longest: int
    """Upper bound of `length`, known on the host."""
    key_basis: Tensor | None = None
    """Orthogonal [R or 1, D, D] float32: stored key = key @ basis, so queries are rotated alike; None: identity."""
    value_basis: Tensor | None = None
    """As of keys; outputs are turned back."""
    spans: Spans | None = None
    """As of `Ragged`."""

    def host_spans(self) -> Spans:
        """(offset, length) of every row; a host sync where the host does not know them."""
        if self.spans is not None:
            return self.spans
        return Spans(zip(self.offset.tolist(), self.length.tolist(), strict=True))


class Tail(NamedTuple):
    """Keys and values after the segment; the last T slots in use are the new tokens."""

    keys: Tensor
    """[B, H, M, D], M >= T."""
    values: Tensor
    """[B, H, M, D]."""
    mask: Tensor | None = None
    """[B, 1, T, M] True where a new token attends to a slot; None: causal, no padding."""
    used: Tensor | None = None
    """[1] integer on the device: slots in use of a tail of fixed capacity M, as a CUDA graph needs it. The other slots
    are not read. None: all M."""


class Pages(NamedTuple):
    """The pages that a single new token reads.

    Page p holds entries p * size … (p + 1) * size - 1 of a row: those of its segment first, then the slots of the tail
    that the token attends to.
    """

    numbers: Tensor
    """[B*H, N], or [B*H*G, N] with a list for every query head; -1 for none."""
    size: int
    """Entries of a page."""
