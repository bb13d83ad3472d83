"""DELTA: some layers attend to everything and choose the pages of those after them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.core.entry_selector import EntrySelector, Lookup, State
from learnkv.errors import UserError


class DELTA(EntrySelector):
    """The pages that the last full layer attended to most, for all heads alike (DELTA, arXiv 2510.09883).

    A full layer attends to everything. Its page scores are sums over the entries of a page of the largest softmax
    weight that any query head gives them, and the layers up to the next full one read the last `recent_pages` pages and
    the best of the others; everything where there are no more pages than the budget holds. The authors put full layers
    where the attention of neighbouring layers differs most; 2, 14 and 23 in one of their models.

    `full_layers` and `dense_layers` are read beyond the budget. The authors' second selector subtracts 1e-7 times the
    number of a page from its score, so that of equal pages the earlier is read; the first leaves it open.

    Args:
        page_size: entries of a page.
        recent_pages: last pages that are always read, at most as many as are read at all.
        dense_layers: number of first layers that read everything.
        full_layers: layers that read everything and choose; the first after the dense ones must be among them. None:
            this one only.
        tie_break: subtracted from a page's score for every page before it.
    """

    status = "numbers"
    aligned = True

    def __init__(
        self,
        page_size: int = 16,
        recent_pages: int = 8,
        dense_layers: int = 2,
        full_layers: Sequence[int] | None = None,
        tie_break: float = 1e-7,
    ) -> None:
        super().__init__()
        if page_size < 1 or recent_pages < 1 or dense_layers < 0:
            raise UserError(
                f"page_size={page_size} recent_pages={recent_pages} dense_layers={dense_layers}: expected at least 1 "
                "entry, 1 page and a number of layers"
            )
        full = [dense_layers] if full_layers is None else list(full_layers)
        if dense_layers not in full:
            raise UserError(f"full_layers={full}: expected layer {dense_layers}, the first after the dense ones, too")
        self.page_size, self.recent_pages, self.dense_layers = page_size, recent_pages, dense_layers
        self.full_layers, self.tie_break = frozenset(full), tie_break

    def scores(self, weights: Tensor) -> Tensor:
        """[B, P] of softmax weights [B, N, E] of N query heads, 0 where there is no entry."""
        most = weights.amax(1)
        rest = -most.shape[-1] % self.page_size
        scores: Tensor = torch.nn.functional.pad(most, (0, rest)).unflatten(-1, (-1, self.page_size)).sum(-1)
        return scores

    def choose(self, scores: Tensor, entries: Tensor, count: Tensor) -> Tensor:
        """True for the `count` [B] pages [B, P] to read of heads with `entries` [B], by `scores` [B, P]."""
        number = torch.arange(scores.shape[-1], device=scores.device)
        pages = (-(-entries // self.page_size)).unsqueeze(-1)
        ranked = scores.double() - self.tie_break * number.double()
        recent = count.clamp(max=self.recent_pages).unsqueeze(-1)
        ranked = ranked.masked_fill(number >= pages - recent, torch.inf).masked_fill(number >= pages, -torch.inf)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(-1, order, number.expand_as(order))
        return (rank < count.unsqueeze(-1)) & (number < pages)

    def planned(self, entries: Tensor, tokens: Tensor) -> Tensor:
        """Entries to read, in whole pages."""
        return entries.minimum((tokens // self.page_size).clamp(min=1).unsqueeze(-1) * self.page_size)

    def forward(self, lookup: Lookup, state: State) -> tuple[Tensor | None, State]:
        if lookup.layer_idx in self.full_layers:
            scores = self.scores(lookup.weights.flatten(1, 2))
            count = (lookup.tokens // self.page_size).clamp(min=1)
            lookup.shared["pages"] = self.choose(scores, lookup.entries[:, 0], count)
            return None, state
        return lookup.shared["pages"].unsqueeze(1).expand(-1, lookup.keys.shape[1], -1), state
