"""Query-aware page selection: which pages of a cache a new token attends to."""

from abc import ABC, abstractmethod

from torch import Tensor

from learnkv.core.component import Component


class PageSelector(Component, ABC):
    """Chooses, for every new token, pages of entries from its query and from bounds of their keys. Nothing is freed.

    Page p of a head holds its entries p * page_size … (p + 1) * page_size - 1; the last entry is the new token itself,
    whose page may be the only one that is not full. A row of a batch must get the pages that it would get alone.
    """

    page_size: int = 16
    dense_layers: int = 0
    """Number of first layers that attend to everything."""
    aligned = False
    window = 0
    remembers = False

    @abstractmethod
    def count(self, entries: Tensor, tokens: Tensor) -> Tensor:
        """Number of pages to read [B, H], int64, of heads with `entries` [B, H], for `tokens` [B] entries."""

    @abstractmethod
    def most(self, tokens: int) -> int:
        """Upper bound of `count` for `tokens` entries, known on the host."""

    @abstractmethod
    def forward(self, query: Tensor, bounds: Tensor, entries: Tensor, tokens: Tensor, most: int) -> Tensor:
        """Pages to read, int32 [B*H, N] or, where every query head has a list of its own, [B*H*G, N].

        Ascending, then -1; without host-device synchronisation.

        Args:
            query: [B, H*G, D] of the new token, after RoPE.
            bounds: [B, H, 2, P, D] smallest and largest key of every page, channel by channel; pages without entries
                are inside out.
            entries: [B, H] entries of every head, the new token included.
            tokens: [B] entries to read per head.
            most: upper bound of `count`, at most P.
        """
