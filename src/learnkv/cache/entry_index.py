"""Query-aware attention of one layer by its keys: the entries that each token attends to, and how many these were."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from learnkv.cache.page_index import PageIndex
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.core.entry_selector import AnySelector, EntrySelector, Lookup, State
from learnkv.core.observation import Observation
from learnkv.core.page_selector import PageSelector
from learnkv.errors import UserError
from learnkv.ops.arguments import Pages
from learnkv.ops.device import upload
from learnkv.ops.softmax_terms import SoftmaxTerms
from learnkv.ops.tail_slots import padding_last, tail_slots


class ReadCount:
    """Entries of the prompt that tokens have attended to, summed; forks of a cache count together."""

    def __init__(self, entries: Tensor, tokens: Tensor) -> None:
        self.entries, self.tokens = entries, tokens  # [B, H] float64 and [B]

    def add(self, entries: Tensor, counts: Tensor) -> None:
        """One token of every row that `counts` [B], which read `entries` [B, H]."""
        self.entries += entries * counts.unsqueeze(-1)
        self.tokens += counts


class EntryIndex:
    """Selects entries by the products of a token's query with all keys; the interface is that of `PageIndex`.

    Args:
        selector: chooses the entries.
        tokens: entries that a token may attend to, per head, for every row of the batch.
        segment: the kept entries of the layer.
        layer_idx: number of the layer.
        state: of the selector.
        shared: what layers leave for later ones, the same object in all of them.
    """

    def __init__(
        self,
        selector: EntrySelector,
        tokens: Sequence[int],
        segment: Segment,
        layer_idx: int,
        state: State,
        shared: dict[str, Tensor],
    ) -> None:
        self.selector, self.layer_idx, self.state, self.shared = selector, layer_idx, state, shared
        self.tokens = upload(tokens, segment.offset.device)
        rows = segment.length.view(len(self.tokens), -1)
        none = torch.zeros(rows.shape, dtype=torch.float64, device=rows.device)
        self.reads = ReadCount(none, none[:, 0].clone())

    def rebuilt(self, segment: Segment) -> "EntryIndex":
        """The index of another segment, with the same selector and tokens."""
        if self.selector.aligned:
            raise UserError(f"pages={self.selector.name}: expected heads that hold the whole prompt, nothing evicted")
        return EntryIndex(self.selector, self.tokens.tolist(), segment, self.layer_idx, {}, self.shared)

    @torch.no_grad()
    def choose(
        self,
        query: Tensor,
        segment: Segment,
        tail: DecodeBuffer,
        mask: Tensor | None,
        scaling: float,
        terms: SoftmaxTerms,
    ) -> Pages | None:
        """The entries that a single new token reads, as pages; None where it, or each of several, reads everything.

        Args:
            query: [B, H*G, T, D].
            mask: [B, 1, T, M] True where a token attends to a slot of the tail; None: all.
            scaling: factor on query-key products.
            terms: soft cap and sinks of the model.
        """
        if query.shape[2] > 1:
            return None
        batch, heads = query.shape[0], tail.keys.shape[1]
        visible = query.new_ones(batch, tail.length, dtype=torch.bool)
        if mask is not None:
            visible = mask[:, 0, 0].expand(batch, -1)
        keys, valid = _entries(segment, tail, visible)
        grouped = query[:, :, 0].unflatten(1, (heads, -1)).float()
        logits = (grouped @ keys.float().mT * scaling).masked_fill(~valid.unsqueeze(2), -torch.inf)
        prompt = segment.length.view(batch, heads)
        parts = (query[:, :, 0], keys, logits, valid.sum(-1), prompt, self.tokens, self.layer_idx)
        chosen, state = self.selector(Lookup(*parts, scaling, self.shared, terms), self.state)
        newest = visible[:, -1]  # padding of a batch leaves no trace
        self.state = {name: _rows_where(newest, new, self.state.get(name)) for name, new in state.items()}
        if chosen is None:
            self.reads.add(prompt, newest)
            return None
        self.reads.add(self._of_prompt(chosen, prompt), newest)
        flat = chosen.flatten(0, -2)
        order = padding_last(flat)
        pages = order.masked_fill(~flat.gather(1, order), -1).to(torch.int32)
        return Pages(pages, self.selector.page_size)

    def _of_prompt(self, chosen: Tensor, prompt: Tensor) -> Tensor:
        """Entries [B, H] of the prompt in the chosen pages, the mean over query heads."""
        size = self.selector.page_size
        begin = torch.arange(chosen.shape[-1], device=chosen.device) * size
        sizes = (prompt.unsqueeze(-1) - begin).clamp(0, size).double()
        if chosen.dim() == 4:
            return (chosen * sizes.unsqueeze(2)).sum(-1).mean(-1)
        return (chosen * sizes).sum(-1)

    def attended(self, segment: Segment) -> Tensor:
        """Entries of the segment [B, H] that a token attended to so far, on average; before any token as planned."""
        planned = self.selector.planned(segment.length.view(len(self.tokens), -1), self.tokens)
        tokens = self.reads.tokens.unsqueeze(-1)
        return torch.where(tokens > 0, self.reads.entries / tokens.clamp(min=1), planned.double())

    def fork(self) -> "EntryIndex":
        """An independent index; what it reads counts for both."""
        return copy.copy(self)

    def rows(self, batch: Tensor) -> "EntryIndex":
        """The index of batch rows `batch` [B']."""
        batch, twin = batch.to(self.tokens.device), copy.copy(self)
        twin.tokens = self.tokens[batch]
        twin.state = {name: part[batch] for name, part in self.state.items()}
        twin.reads = ReadCount(self.reads.entries[batch], self.reads.tokens[batch])
        return twin

    def crop(self, slots: int) -> None:
        """Go on after the first `slots` of the tail; UserError for a selector that remembers tokens."""
        if self.selector.remembers:
            raise UserError(f"pages={self.selector.name}: remembers tokens, which cannot be removed")

    def row_nbytes(self) -> int:
        """Bytes of one row of the batch."""
        return sum(part.nbytes for part in self.tensors()) // len(self.tokens)

    def tensors(self) -> list[Tensor]:
        """All tensors of the index."""
        return [self.tokens, *self.state.values()]


AnyIndex = PageIndex | EntryIndex


def index_of(
    selector: AnySelector,
    tokens: Sequence[int],
    segment: Segment,
    layer_idx: int,
    observe: Callable[[], Observation],
    shared: dict[str, Tensor],
) -> AnyIndex | None:
    """The index of a layer that keeps `segment`; None for one that attends to everything.

    Args:
        selector, tokens, segment, layer_idx, shared: as of `EntryIndex`.
        observe: what was captured of the prompt; UserError where entries were evicted.
    """
    if layer_idx < selector.dense_layers:
        return None
    if isinstance(selector, PageSelector):
        return PageIndex(selector, tokens, segment)
    state: State = {}
    if selector.aligned:
        state = selector.begin(observe(), upload(tokens, segment.offset.device))
    return EntryIndex(selector, tokens, segment, layer_idx, state, shared)


def _entries(segment: Segment, tail: DecodeBuffer, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [B, H, E, D] of every head in their order, those of the tail last, and which of them exist."""
    batch, heads, slots, dim = tail.keys.shape
    order, count = tail_slots(visible)
    length = segment.length.view(batch, heads, 1)
    entry = torch.arange(segment.longest + slots, device=length.device).expand(batch, heads, -1)
    place = (entry - length).clamp(0, slots - 1)
    slot = order.unsqueeze(1).expand(-1, heads, -1).gather(2, place)
    new = tail.keys.gather(2, slot.unsqueeze(-1).expand(-1, -1, -1, dim))
    valid = entry < length + count.view(-1, 1, 1)
    if not len(segment.keys):
        return new, valid
    source = (segment.offset.view(batch, heads, 1) + entry).clamp(max=len(segment.keys) - 1)
    return torch.where((entry < length).unsqueeze(-1), segment.keys[source], new), valid


def _rows_where(rows: Tensor, new: Tensor, old: Tensor | None) -> Tensor:
    """Rows of `new` [B, …] where True, else of `old`."""
    return new if old is None else torch.where(rows.view(-1, *[1] * (new.dim() - 1)), new, old)
