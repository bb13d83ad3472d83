"""Codecs: how keys or values are stored, and what that costs."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.errors import UserError
from learnkv.ops.arguments import Codes

ScaleDtype = Literal["float16", "bfloat16", "float32"]


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise UserError for a value that the Literal `kind` does not have."""
    if value not in get_args(kind):
        raise UserError(f"{name}={value!r}: expected {', '.join(get_args(kind))}")


def torch_dtype(name: ScaleDtype) -> torch.dtype:
    """The dtype of scales, zeros and norms."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


class Rows(NamedTuple):
    """Ragged rows of a pool: row r = b * H + h owns `pool[offset[r] : offset[r] + length[r]]`, by position."""

    offset: Tensor
    """[R] int64."""
    length: Tensor
    """[R] int64."""
    layer_idx: int = 0
    queries: Tensor | None = None
    """[R, G, W, D] last W prompt queries after RoPE of the G query heads of a row, for codecs that need them."""

    @classmethod
    def of(cls, length: Sequence[int], layer_idx: int = 0, queries: Tensor | None = None) -> "Rows":
        """Rows of these lengths, after each other."""
        entries = torch.tensor(length, dtype=torch.int64)
        return cls(entries.cumsum(0) - entries, entries, layer_idx, queries)


class Source(NamedTuple):
    """What a codec is to encode: checked, rotated, rows after each other."""

    entries: Tensor
    """[N, D] rotated; float32 where the codec rotates."""
    lengths: Sequence[int]
    """Entries of every row."""
    dtype: torch.dtype
    """Of the entries before they were rotated, in which entries at full precision are stored."""
    layer_idx: int = 0
    queries: Tensor | None = None


@dataclass(frozen=True)
class Encoded:
    """What a codec made of ragged rows, after each other."""

    tensors: Mapping[str, Tensor]
    """All that is alive, by name; each has a storage of its own."""
    entries: tuple[int, ...]
    """Of every row."""
    head_dim: int
    layer_idx: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        storages = [tensor.untyped_storage() for tensor in self.tensors.values()]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Codec(Component, ABC):
    """Stores keys or values [N, D] of ragged rows in fewer bits.

    A codec may rotate before it rounds. What is stored stays rotated: `decode` gives rotated vectors, queries are
    rotated with `rotate` before they meet keys, and attention outputs turned back with `unrotate`. Rotations are
    orthogonal, so products of queries and keys do not change.

    Tables that do not depend on the entries (rotations, centroids, codebooks) are the codec's, once for a model; the
    bytes of an encoding are all others: codes, scales, zeros, norms, entries at full precision, padding of bytes.
    """

    before_rope: bool = False
    """Whether keys are stored as they are before RoPE; the cache turns them back and rotates what it decodes."""
    query_window: int = 0
    """Last queries of the prompt that it reads."""
    independent: bool = False
    """Whether entries are stored without regard to others, in equally many bytes each."""
    unchanged: bool = False
    """Whether entries of 16 bits are stored as they are."""
    scale_dtype: ScaleDtype = "float16"

    @abstractmethod
    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        """Exact bytes of rows with these numbers of entries.

        Args:
            entries: of every row.
            head_dim: D.
            itemsize: bytes of a number at full precision.

        Raises:
            UserError: for a D that the codec does not have.
        """

    @abstractmethod
    def _encode(self, source: Source) -> dict[str, Tensor]:
        """Tensors of the entries, by name."""

    @abstractmethod
    def _decode(self, encoded: Encoded) -> Tensor:
        """Rotated entries [N, D], float32."""

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        """Orthogonal [H, D, D] or, the same for all heads, [1, D, D], float32: stored = vector @ basis. None: identity.

        Args:
            layer_idx: of the layer.
            head_dim: D.
            device: of the result; None: the CPU, or that of a table.

        Raises:
            UserError: for a D without one.
        """
        return None

    def encode(self, entries: Tensor, rows: Rows) -> Encoded:
        """Pack the entries of the rows, row after row; the entries do not change.

        Args:
            entries: [N, D] pool of keys or values; bytes of full precision are those of its dtype.
            rows: which of them.

        Raises:
            UserError: for NaN, infinite numbers, numbers whose scale exceeds its dtype, or a D the codec does not have.
        """
        if self.query_window and rows.queries is None:
            raise UserError(f"{self.name}: needs the last queries of the prompt, got none")
        lengths = rows.length.tolist()
        head_dim = entries.shape[-1]
        self.nbytes(lengths, head_dim)  # refuses what the codec does not have
        kept = entries.detach()[_index(rows).to(entries.device)]
        if not bool(kept.isfinite().all()):
            raise UserError(f"{self.name}: keys or values hold NaN or infinite numbers, which no code stands for")
        rotated = self._rotated_rows(kept, lengths, rows.layer_idx)
        encoded = self._encode(Source(rotated, lengths, entries.dtype, rows.layer_idx, rows.queries))
        tensors = {name: _compact(tensor) for name, tensor in encoded.items()}
        if not all(_is_finite(tensor) for tensor in tensors.values()):
            raise UserError(
                f"{self.name}: numbers up to {float(kept.abs().max()):.3g} exceed what {self.scale_dtype} scales hold"
            )
        return Encoded(tensors, tuple(lengths), head_dim, rows.layer_idx)

    def decode(self, encoded: Encoded, dtype: torch.dtype = torch.float32) -> Tensor:
        """Entries [N, D] as they are stored, that is rotated, row after row."""
        return self._decode(encoded).to(dtype)

    def round_trip(self, entries: Tensor, layer_idx: int, heads: int) -> Tensor:
        """Entries [B, H, S, D] as attention reads them: encoded, decoded and turned back, in their own dtype."""
        rows = [entries.shape[2]] * (entries.shape[0] * heads)
        decoded = self.decode(
            self.encode(entries.reshape(-1, entries.shape[-1]), Rows.of(rows, layer_idx)), entries.dtype
        )
        return self.unrotate(decoded.view(len(rows), *entries.shape[2:]), layer_idx).view(entries.shape)

    def codes(self, encoded: Encoded) -> Codes | None:
        """The entries as codes that attention can read; None: they are decoded for it."""
        return None

    def rotate(self, vectors: Tensor, layer_idx: int = 0) -> Tensor:
        """Vectors [R, T, D] (queries of row r = b * H + h, keys) in the basis of what is stored."""
        return self._turned(vectors, layer_idx, inverse=False)

    def unrotate(self, vectors: Tensor, layer_idx: int = 0) -> Tensor:
        """Vectors [R, T, D] (attention outputs over stored values) in the model's own basis: the inverse."""
        return self._turned(vectors, layer_idx, inverse=True)

    def _turned(self, vectors: Tensor, layer_idx: int, inverse: bool) -> Tensor:
        basis = self.basis(layer_idx, vectors.shape[-1], vectors.device)
        if basis is None:
            return vectors
        basis = basis.repeat(len(vectors) // len(basis), 1, 1)
        return (vectors.float() @ (basis.transpose(1, 2) if inverse else basis)).to(vectors.dtype)

    def _rotated_rows(self, entries: Tensor, lengths: Sequence[int], layer_idx: int) -> Tensor:
        """Entries [N, D] in the stored basis, float32 where they are rotated."""
        basis = self.basis(layer_idx, entries.shape[-1], entries.device)
        if basis is None or not lengths:
            return entries
        if len(lengths) % len(basis):
            raise UserError(f"{self.name}: rotations of {len(basis)} heads do not suit {len(lengths)} rows")
        parts = entries.float().split(list(lengths))
        return torch.cat([part @ basis[row % len(basis)] for row, part in enumerate(parts)])


def _index(rows: Rows) -> Tensor:
    """Places [N] of the rows' entries in the pool."""
    offset, length = rows.offset, rows.length
    first = (offset - (length.cumsum(0) - length)).repeat_interleave(length)
    return first + torch.arange(len(first), device=first.device)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor with a storage that holds nothing else."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.float().isfinite().all())
