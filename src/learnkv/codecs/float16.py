"""Entries of 16 bits."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, Source


class Float16(Codec):
    """Entries as float16 where the model computes in more bits; those of 16 bits as they are.

    Budgets in bytes count keys and values of 16 bits, also where a CPU computes in float32.
    """

    independent = True
    unchanged = True

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        return 2 * sum(entries) * head_dim

    def _encode(self, source: Source) -> dict[str, Tensor]:
        narrow = source.dtype.itemsize <= 2
        return {"entries": source.entries if narrow else source.entries.to(torch.float16)}

    def _decode(self, encoded: Encoded) -> Tensor:
        return encoded.tensors["entries"].float()
