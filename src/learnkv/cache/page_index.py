"""Query-aware attention of one layer: bounds of its pages, kept up to date, and the pages that a token attends to."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from learnkv.cache.storage import TAIL_CHUNK, DecodeBuffer, Segment, can_write
from learnkv.core.page_selector import PageSelector
from learnkv.ops.arguments import Pages
from learnkv.ops.device import upload
from learnkv.ops.page_bounds import empty_bounds, page_bounds
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.ops.tail_slots import tail_slots


class PageIndex:
    """Bounds of the pages of a layer, which run through the segment and on through the tail.

    Single tokens are added to the bounds as they come. After any other change of the tail the bounds are computed anew
    when they are needed next.

    Args:
        selector: chooses the pages.
        tokens: entries that a token may attend to, per head, for every row of the batch.
        segment: the kept entries of the layer.
    """

    def __init__(self, selector: PageSelector, tokens: Sequence[int], segment: Segment) -> None:
        self.selector = selector
        self.tokens = upload(tokens, segment.offset.device)
        self.max_pages = selector.most(max(tokens))
        self.bounds: Tensor | None = None
        """[B*H, 2, P, D]."""
        self.tail_slots = 0
        """Slots of the tail within the bounds."""
        self._longest = 0
        self._writable = True
        self._enclose_segment(segment)

    def rebuilt(self, segment: Segment) -> "PageIndex":
        """The index of another segment, with the same selector and tokens."""
        return PageIndex(self.selector, self.tokens.tolist(), segment)

    def _pages(self, entries: int) -> int:
        return -(-entries // self.selector.page_size)

    def _enclose_segment(self, segment: Segment) -> Tensor:
        """Bounds of the segment alone."""
        self._longest = int(segment.length.max())
        rows, dim = len(segment.offset), segment.keys.shape[-1]
        self.bounds = bounds = empty_bounds(segment.keys, rows, 2, self._pages(self._longest + TAIL_CHUNK), dim)
        entries = segment.ragged._replace(longest=self._longest)
        page_bounds(entries, torch.zeros_like(segment.offset), bounds, self.selector.page_size)
        self.tail_slots, self._writable = 0, True
        return bounds

    @torch.no_grad()
    def choose(
        self,
        query: Tensor,
        segment: Segment,
        tail: DecodeBuffer,
        mask: Tensor | None,
        scaling: float = 1.0,
        terms: SoftmaxTerms = NO_TERMS,
    ) -> Pages | None:
        """The pages that a single new token reads; None where there are several, which read everything.

        Args:
            query: [B, H*G, T, D].
            mask: [B, 1, T, M] True where a token attends to a slot of the tail; None: all.
            scaling, terms: of the logits, whose order they do not change.
        """
        if self.tail_slots and (query.shape[2] > 1 or self.tail_slots >= tail.length):
            # Padding of a question is known after it only; slots that were cropped are still within the bounds.
            self.bounds, self.tail_slots = None, 0
        if query.shape[2] > 1:
            return None
        batch, heads = query.shape[0], len(segment.offset) // query.shape[0]
        visible = None if mask is None else mask[:, 0, 0].expand(batch, -1)
        bounds = self._enclose_tail(segment, tail, visible)
        all_slots = query.new_full((batch,), tail.length, dtype=torch.long)
        count = all_slots if visible is None else visible.sum(-1)
        entries = segment.length.view(batch, heads) + count.unsqueeze(-1)
        most = min(self.max_pages, bounds.shape[2])
        pages = self.selector(query[:, :, 0], bounds.unflatten(0, (batch, heads)), entries, self.tokens, most)
        return Pages(pages, self.selector.page_size)

    def _enclose_tail(self, segment: Segment, tail: DecodeBuffer, visible: Tensor | None) -> Tensor:
        """Extend the bounds to the new slots of the tail; `visible` [B, M] are tokens, None: all."""
        bounds = self._enclose_segment(segment) if self.bounds is None else self.bounds
        if self._pages(self._longest + tail.length) > bounds.shape[2] or not (self._writable and can_write(bounds)):
            self.bounds = bounds = self._copy(bounds, self._pages(self._longest + tail.length + TAIL_CHUNK))
        entries, first, slots = tail.ragged(self.tail_slots), segment.length + self.tail_slots, None
        if visible is not None:
            heads = len(segment.offset) // len(visible)
            order, count = tail_slots(visible[:, self.tail_slots :])
            before = visible[:, : self.tail_slots].sum(-1)
            slots, entries = order.repeat_interleave(heads, 0), entries._replace(length=count.repeat_interleave(heads))
            first = segment.length + before.repeat_interleave(heads)
        page_bounds(entries, first, bounds, self.selector.page_size, slots)
        self.tail_slots = tail.length
        return bounds

    def _copy(self, bounds: Tensor, pages: int) -> Tensor:
        """The bounds with room for `pages` pages."""
        wider = empty_bounds(bounds, bounds.shape[0], 2, pages, bounds.shape[3])
        wider[:, :, : bounds.shape[2]] = bounds[:, :, :pages]
        self._writable = True
        return wider

    def crop(self, slots: int) -> None:
        """Forget the bounds where they enclose more than the first `slots` of the tail."""
        if self.tail_slots > slots:
            self.bounds, self.tail_slots = None, 0

    def attended(self, segment: Segment) -> Tensor:
        """Entries of the segment [B, H] that a token attends to while the tail is empty."""
        entries = segment.length.view(len(self.tokens), -1)
        return torch.minimum(self.selector.count(entries, self.tokens) * self.selector.page_size, entries)

    def fork(self) -> "PageIndex":
        """An independent index, which shares the bounds until either changes them."""
        self._writable = False
        return copy.copy(self)

    def rows(self, batch: Tensor) -> "PageIndex":
        """The index of batch rows `batch` [B']."""
        batch, twin = batch.to(self.tokens.device), copy.copy(self)
        twin.tokens = self.tokens[batch]
        if self.bounds is not None:
            twin.bounds = self.bounds.unflatten(0, (len(self.tokens), -1))[batch].flatten(0, 1)
            twin._writable = True
        return twin

    def row_nbytes(self) -> int:
        """Bytes of one row of the batch."""
        return sum(part.nbytes for part in self.tensors()) // len(self.tokens)

    def tensors(self) -> list[Tensor]:
        """All tensors of the index."""
        return [self.tokens] if self.bounds is None else [self.tokens, self.bounds]
