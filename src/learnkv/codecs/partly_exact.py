"""Some entries of every row at full precision, the others as another codec stores them."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, Source


class PartlyExact(Codec):
    """Entries that a rule about a row's length names stay in their own dtype; `codec` stores the others.

    The rule needs no table: which entries are exact follows from the length, which the cache has.

    Args:
        codec: of the others.
    """

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        self.codec = codec
        self.scale_dtype, self.query_window = codec.scale_dtype, codec.query_window

    @abstractmethod
    def exact(self, entries: int) -> Tensor:
        """Mask [entries] of those of a row that stay at full precision."""

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        return self.codec.basis(layer_idx, head_dim, device)

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        others = self._others(entries)
        return self.codec.nbytes(others, head_dim, itemsize) + (sum(entries) - sum(others)) * head_dim * itemsize

    def _others(self, entries: Sequence[int]) -> list[int]:
        """Entries of every row that the codec stores."""
        return [count - int(self.exact(count).sum()) for count in entries]

    def _mask(self, entries: Sequence[int]) -> Tensor:
        return torch.cat([torch.zeros(0, dtype=torch.bool), *(self.exact(count) for count in entries)])

    def _encode(self, source: Source) -> dict[str, Tensor]:
        mask = self._mask(source.lengths).to(source.entries.device)
        others = source._replace(entries=source.entries[~mask], lengths=self._others(source.lengths))
        return {"exact": source.entries[mask].to(source.dtype), **self.codec._encode(others)}

    def _decode(self, encoded: Encoded) -> Tensor:
        tensors = dict(encoded.tensors)
        exact = tensors.pop("exact")
        mask = self._mask(encoded.entries).to(exact.device)
        decoded = exact.new_empty(len(mask), encoded.head_dim, dtype=torch.float32)
        decoded[mask] = exact.float()
        others = replace(encoded, tensors=tensors, entries=tuple(self._others(encoded.entries)))
        decoded[~mask] = self.codec._decode(others)
        return decoded
