"""Query-aware reading of one layer: bounds of its pages, kept up to date, and the pages that a token attends to."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.storage import TAIL_CHUNK, DecodeBuffer, Segment
from learnkv.core.page_selector import PageSelector
from learnkv.ops.device import upload
from learnkv.ops.page_bounds import empty_bounds, page_bounds
from learnkv.ops.tail_slots import tail_slots


class Reading:
    """What a layer knows of its pages. They run through the segment and on through the tail.

    Single tokens are added to the bounds as they come. Whatever else happens to the tail, the bounds are made anew when
    they are needed next.

    Args:
        selector: chooses the pages.
        tokens: entries that a token may attend to, per head, for every row of the batch.
        segment: what the layer holds of the prompt.
    """

    def __init__(self, selector: PageSelector, tokens: Sequence[int], segment: Segment) -> None:
        self.selector = selector
        self.tokens = upload(tokens, segment.start.device)
        self.most = selector.most(max(tokens))
        self.bounds: Tensor | None = None
        self._begin(segment)

    def _begin(self, segment: Segment) -> Tensor:
        """Enclose the segment."""
        pool, dim = segment.keys, segment.keys.shape[-1]
        self.longest = int(segment.length.max())
        pages = -(-(self.longest + TAIL_CHUNK) // self.selector.page_size)
        self.bounds = bounds = empty_bounds(pool, len(segment.start), 2, pages, dim)
        first = torch.zeros_like(segment.start)
        page_bounds(pool, segment.start, segment.length, self.longest, first, bounds, self.selector.page_size)
        self.enclosed, self._writable = 0, True
        return bounds

    @torch.no_grad()
    def choose(self, query: Tensor, segment: Segment, tail: DecodeBuffer, mask: Tensor | None) -> dict[str, Any]:
        """Arguments that let `decode_attention` read what the newest tokens may: one token chosen pages, several all.

        Args:
            query: [B, H*G, T, D].
            mask: [B, 1, T, M] True where a token sees a slot of the tail; None: all.
        """
        if self.enclosed and (query.shape[2] > 1 or self.enclosed >= tail.length):
            # Which slots of a question are padding shows afterwards; what was cropped is still enclosed.
            self.bounds, self.enclosed = None, 0
        if query.shape[2] > 1:
            return {}
        batch, heads = query.shape[0], len(segment.start) // query.shape[0]
        seen = None if mask is None else mask[:, 0, 0].expand(batch, -1)
        bounds = self._enclose(segment, tail, seen)
        said = query.new_full((batch,), tail.length, dtype=torch.long) if seen is None else seen.sum(-1)
        entries = segment.length.view(batch, heads) + said.unsqueeze(-1)
        most = min(self.most, bounds.shape[2])
        pages = self.selector(query[:, :, 0], bounds.unflatten(0, (batch, heads)), entries, self.tokens, most)
        return {"pages": pages, "page_size": self.selector.page_size}

    def _enclose(self, segment: Segment, tail: DecodeBuffer, seen: Tensor | None) -> Tensor:
        """Add what the tail has and the bounds do not know."""
        bounds = self._begin(segment) if self.bounds is None else self.bounds
        pages = -(-(self.longest + tail.length) // self.selector.page_size)
        if pages > bounds.shape[2] or not self._writable:
            more = -(-(self.longest + tail.length + TAIL_CHUNK) // self.selector.page_size)
            wider = empty_bounds(bounds, bounds.shape[0], 2, more, bounds.shape[3])
            wider[:, :, : bounds.shape[2]] = bounds[:, :, :more]
            self.bounds = bounds = wider
            self._writable = True
        pool, apart = tail.pool
        new, rows = tail.length - self.enclosed, len(segment.start)
        start = torch.arange(rows, device=pool.device) * apart + self.enclosed
        length, first, slots = torch.full_like(start, new), segment.length + self.enclosed, None
        if seen is not None:
            heads = rows // len(seen)
            order, count = tail_slots(seen[:, self.enclosed :])
            before = seen[:, : self.enclosed].sum(-1)
            slots, length = order.repeat_interleave(heads, 0), count.repeat_interleave(heads)
            first = segment.length + before.repeat_interleave(heads)
        page_bounds(pool, start, length, new, first, bounds, self.selector.page_size, slots)
        self.enclosed = tail.length
        return bounds

    def of_prompt(self, segment: Segment) -> Tensor:
        """Entries of the segment [B, H] that a token attends to, were nothing read after it."""
        entries = segment.length.view(len(self.tokens), -1)
        return torch.minimum(self.selector.count(entries, self.tokens) * self.selector.page_size, entries)

    def fork(self) -> "Reading":
        """A reading of its own, which shares the bounds until either changes them."""
        self._writable = False
        return copy.copy(self)

    def rows(self, batch: Tensor) -> "Reading":
        """The reading of batch rows `batch` [B']."""
        at, twin = batch.to(self.tokens.device), copy.copy(self)
        twin.tokens = self.tokens[at]
        if self.bounds is not None:
            twin.bounds = self.bounds.unflatten(0, (len(self.tokens), -1))[at].flatten(0, 1)
            twin._writable = True
        return twin

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        return [self.tokens] if self.bounds is None else [self.tokens, self.bounds]
