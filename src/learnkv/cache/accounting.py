"""What a compressed cache holds, in entries and in bytes."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from learnkv.cache.layer import CompressedLayer
from learnkv.core.precision import TABLE_BYTES


class Accounting(Cache, ABC):
    """Counts of entries and bytes, over the layers that a policy compresses."""

    def __init__(self, layers: Sequence[CacheLayerMixin]) -> None:
        super().__init__(layers=list(layers))
        self.prompt_lengths: list[int] = []
        self.covered: list[int] = []  # tokens of each row, merged ones included; empty: none was merged
        self.budgets: Tensor | None = None
        self.no_entries: dict[torch.device, Tensor] = {}  # the table of segments whose entries are all in tiers
        self.narrow = False  # whether bytes are compared with those of a cache of 16 bits

    @abstractmethod
    def compressed_layers(self) -> list[CompressedLayer]:
        """The layers that a policy compresses, in order."""

    @abstractmethod
    def refuse_invalid(self) -> None:
        """Raise UserError where a policy's scores or budgets were not numbers."""

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the compressible layers."""
        for layer in self.compressed_layers():
            yield from layer.tensors()

    @property
    def nbytes(self) -> int:
        """Bytes of unique storage: kept entries, positions, tables and the allocated tails."""
        storages = (tensor.untyped_storage() for tensor in self.tensors())
        # An empty part of a mapped file begins where the next one does.
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}.values())

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that budgets refer to: the prompt's and those merged since."""
        return self.covered or self.prompt_lengths

    @property
    def full_nbytes(self) -> int:
        """Bytes of the keys and values of all tokens that budgets refer to, padding not counted.

        Of a cache that was compressed to a budget in bytes, or with a precision, those of 16 bits.
        """
        return sum(self.row_full_nbytes())

    def row_full_nbytes(self) -> list[int]:
        """`full_nbytes` of each row."""
        layers = self.compressed_layers()
        token = self.narrow_token_nbytes() if self.narrow else sum(layer.token_nbytes for layer in layers)
        return [token * n for n in self.lengths]

    def narrow_token_nbytes(self) -> int:
        """Bytes of one token's keys and values of 16 bits, in all layers."""
        return sum(2 * heads * (keys + values) for heads, keys, values in self.layer_sizes())

    def layer_sizes(self) -> list[tuple[int, int, int]]:
        """Kv heads, channels of keys and of values of every layer; of one that has read nothing yet the first's."""
        layers = self.compressed_layers()
        return [layer.sizes if layer.is_initialized else layers[0].sizes for layer in layers]

    def row_nbytes(self) -> list[int]:
        """Bytes of what is kept of each row's prompt: entries, positions, tables, pages; the tail not counted."""
        layers = self.compressed_layers()
        segment = layers[0].segment
        # Where all kept entries are in tiers, one table of zeros serves the empty segments of all layers.
        shared = layers[0].heads * TABLE_BYTES if segment is not None and segment.length is segment.offset else 0
        return [sum(row) + shared for row in zip(*(layer.row_nbytes() for layer in layers), strict=True)]

    def row_nbytes_with_tail(self) -> list[int]:
        """`row_nbytes` with the allocated tail, and with the queries that are captured for online eviction.

        The sum over all rows is `nbytes`, unless rows were repeated or left out.
        """
        layers = self.compressed_layers()
        parts = [part for layer in layers for part in (*layer.capture.tensors(), *_buffers(layer))]
        of_row = sum(part.untyped_storage().nbytes() for part in parts) // layers[0].batch
        return [row + of_row for row in self.row_nbytes()]

    @property
    def spent(self) -> list[float]:
        """Fraction of each row's entries that is kept: of the prompt's and of those merged since."""
        self.refuse_invalid()
        if self.budgets is None:
            return [1.0] * len(self.prompt_lengths)
        layers, _, heads = self.budgets.shape
        kept = self.budgets.sum((0, 2)).tolist()
        return [entries / (n * layers * heads) for entries, n in zip(kept, self.lengths, strict=True)]

    @property
    def read(self) -> list[float]:
        """Fraction of each row's prompt entries that a single new token attends to."""
        layers = [layer for layer in self.compressed_layers() if layer.segment is not None]
        if all(layer.page_index is None for layer in layers):
            return self.spent
        counts = [layer.attended_entries().cpu().view(len(self.lengths), -1) for layer in layers]
        share = torch.stack(counts).double().mean((0, 2))
        return (share / torch.tensor(self.lengths)).tolist()


def _buffers(layer: CompressedLayer) -> list[Tensor]:
    """The buffers of a layer's tail."""
    return [] if layer.tail is None else layer.tail.tensors()
