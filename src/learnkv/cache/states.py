"""The three states of a compressed layer: a prompt that is complete, kept entries, or kept entries with gates."""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.cache.entry_index import AnyIndex
from learnkv.cache.evicted import Evicted
from learnkv.cache.storage import DecodeBuffer, Segment
from learnkv.cache.tiers import Carried, StoredTier
from learnkv.core.codec import Codec
from learnkv.core.residual_store import ResidualStore
from learnkv.errors import UserError
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.relaxed_attention import relaxed_attention
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms


class StoredPrompt(NamedTuple):
    """Keys and values [B, H, S, D] of a complete prompt as one level of precision stores them."""

    keys: Tensor
    values: Tensor

    def rows(self, batch: Tensor) -> "StoredPrompt":
        """Of batch rows `batch` [B']."""
        return StoredPrompt(*(part[batch.to(part.device)] for part in self))


Stored = tuple[StoredPrompt, ...]


@dataclass(frozen=True)
class Prompt:
    """Keys and values of every slot, as read; or those of kept entries and the tail, merged to evict again."""

    keys: Tensor
    """[B, H, S, D]."""
    values: Tensor
    """[B, H, S, D]."""
    valid: Tensor | None = None
    """[B, S] False for padding; None: no padding."""
    positions: Tensor | None = None
    """[B, H, S] prompt position of each entry of a merged prompt, negative where there is none; None: as read."""
    rotated: Tensor | None = None
    """[B, H, S] position that each key is rotated to; None: its prompt position."""
    page_index: AnyIndex | None = None
    """Of the entries before the tail was merged; it is made anew for those that will be kept."""
    carried: Carried | None = None
    """Entries [B, H, S] of a merged prompt that are stored in fewer bits already."""
    evicted: Evicted | None = None
    """What is remembered of entries that were evicted before the tail was merged."""
    stored: dict[tuple[str, Codec], Tensor] = field(default_factory=dict, init=False, compare=False)
    """Training: keys and values as codecs store them, once for all students."""

    segment = None
    copies = 1

    @property
    def complete(self) -> "Prompt":
        """The prompt itself."""
        return self

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return self.keys.shape[0]

    def slot_positions(self) -> Tensor:
        """Prompt position of each slot, -1 for padding: [B, S] int64."""
        shape = (self.keys.shape[0], self.keys.shape[2])
        valid = self.valid
        if valid is None:
            valid = torch.ones(shape, dtype=torch.bool, device=self.keys.device)
        return torch.where(valid, valid.cumsum(-1) - 1, -1)

    def entry_positions(self) -> Tensor:
        """Prompt position of each entry, negative where there is none: [B, H, S] int64."""
        if self.positions is not None:
            return self.positions
        return self.slot_positions().unsqueeze(1).expand(-1, self.keys.shape[1], -1)

    def key_positions(self) -> Tensor:
        """Position that each key is rotated to, [B, H, S]."""
        return self.entry_positions() if self.rotated is None else self.rotated

    def append(self, keys: Tensor, values: Tensor) -> "Prompt":
        """The prompt with further keys and values [B, H, T, D]."""
        return replace(self, keys=torch.cat([self.keys, keys], 2), values=torch.cat([self.values, values], 2))

    def seal(self) -> "Kept":
        """All entries are kept, as rows of a pool that is a view of the prompt."""
        prompt = replace(self, keys=self.keys.contiguous(), values=self.values.contiguous())
        return Kept(Segment.whole(prompt.keys, prompt.values, self.slot_positions()), prompt)

    def evicted_with(self, store: ResidualStore, weights: Tensor) -> Evicted:
        """What `store` remembers of entries with weights [B, H, S], 1 for evicted ones, and of those evicted before."""
        return Evicted.of(store, self.keys, self.values, weights.to(self.keys.device), self.evicted)

    def relax(
        self,
        segment: Segment,
        gates: Tensor,
        soft: bool = False,
        stored: Stored = (),
        evicted: Evicted | None = None,
    ) -> "Relaxed":
        """Train: attend to `segment`, or softly to all entries, with gates [B, H, S]; nothing is freed.

        With levels, whose prompts are `stored`, gates are [M, B, H, S]: the mask of the step to each level.
        """
        return Relaxed(segment, self, gates.to(self.keys.device), soft, stored=stored, evicted=evicted)

    def rows(self, batch: Tensor, heads: int) -> "Prompt":
        """The prompts of batch rows `batch` [B']."""

        def of(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[batch.to(part.device)]

        return Prompt(
            self.keys[batch.to(self.keys.device)],
            self.values[batch.to(self.values.device)],
            of(self.valid),
            of(self.positions),
            of(self.rotated),
            None if self.page_index is None else self.page_index.rows(batch),
            evicted=None if self.evicted is None else self.evicted.rows(batch),
        )

    def fork(self) -> "Prompt":
        """The same, as nothing of it changes in place."""
        return self

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        parts = (self.keys, self.values, self.valid, self.positions, self.rotated)
        return [*(part for part in parts if part is not None), *(self.evicted.tensors() if self.evicted else ())]


@dataclass(frozen=True)
class Kept:
    """What is left of a prompt, and what attention reads of it."""

    segment: Segment
    prompt: Prompt | None = None
    """The complete prompt, of which the segment is a view, until entries are evicted or rows are selected."""
    page_index: AnyIndex | None = None
    """Bounds of pages where a single token reads chosen pages only."""
    tiers: tuple[StoredTier, ...] = ()
    """Further entries, in fewer bits."""
    evicted: Evicted | None = None
    """What is remembered of the others."""

    copies = 1

    @property
    def complete(self) -> Prompt:
        """The complete prompt; raises UserError once entries were evicted."""
        if self.prompt is None:
            raise UserError(
                "the prompt has already been compressed or offloaded, or its rows repeated or reordered: compress a "
                "fork before that"
            )
        return self.prompt

    def attend(
        self,
        query: Tensor,
        tail: DecodeBuffer,
        mask: Tensor | None,
        scaling: float,
        terms: SoftmaxTerms = NO_TERMS,
    ) -> Tensor:
        """Attention [B, H*G, T, D] of the newest T tokens; `mask` [B, 1, T, M] of the tail."""
        logits = (scaling, terms)
        pages = None if self.page_index is None else self.page_index.choose(query, self.segment, tail, mask, *logits)
        tiers = [tier.arguments(query.dtype) for tier in self.tiers]
        ragged = self.segment.on(query.device).ragged
        new = tail.arguments(mask)
        if self.evicted is None:
            return decode_attention(query, ragged, new, scaling, pages, tiers, terms, needs_lse=False)[0]
        output, lse = decode_attention(query, ragged, new, scaling, pages, tiers, terms)
        return self.evicted.added(output, lse, query, *logits)

    def row_positions(self, row: int) -> Tensor:
        """Ascending prompt positions of all entries of one row (host sync)."""
        positions = [self.segment.row_positions(row), *(tier.row_positions(row) for tier in self.tiers)]
        return torch.cat(positions).sort().values

    def attended(self) -> Tensor:
        """Entries [B*H] that a single token attends to, while the tail is empty."""
        if self.page_index is not None:
            return self.page_index.attended(self.segment)
        return sum((tier.entries.length for tier in self.tiers), self.segment.length)

    def row_nbytes(self, heads: int) -> list[int]:
        """Bytes of each row of the batch (host sync)."""
        of_heads = [self.segment.row_nbytes(), *(tier.row_nbytes() for tier in self.tiers)]
        pages = 0 if self.page_index is None else self.page_index.row_nbytes()
        extra = 0 if self.evicted is None else self.evicted.head_nbytes(self.segment.keys.shape[-1])
        return ((torch.tensor(of_heads).sum(0) + extra).view(-1, heads).sum(-1) + pages).tolist()

    def rows(self, batch: Tensor, heads: int) -> "Kept":
        """The kept entries of batch rows `batch` [B'], sharing the pool."""
        page_index = None if self.page_index is None else self.page_index.rows(batch)
        evicted = None if self.evicted is None else self.evicted.rows(batch)
        tiers = tuple(tier.rows(batch) for tier in self.tiers)
        return Kept(self.segment.rows(batch, heads), None, page_index, tiers, evicted)

    def fork(self) -> "Kept":
        """A state that shares storage with this one."""
        return self if self.page_index is None else replace(self, page_index=self.page_index.fork())

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        parts = [*self.segment.tensors()]
        for part in (self.prompt, self.page_index, *self.tiers, self.evicted):
            parts += [] if part is None else part.tensors()
        return parts


@dataclass(frozen=True)
class Relaxed:
    """Training: attention to kept entries whose gradient reaches the gate of every entry of the complete prompt."""

    segment: Segment
    complete: Prompt
    """Shared by the continuations of each prompt."""
    gates: Tensor
    """[B, H, S]; with levels [M, B, H, S]."""
    soft: bool = False
    """Whether gates multiply the softmax weights of all entries; else kept entries count as 1, others as 0."""
    copies: int = 1
    """Continuations per prompt."""
    stored: Stored = ()
    """The complete prompt as stored at each level of precision; none: as it is."""
    evicted: Evicted | None = None
    """What is remembered of the entries that do not count, differentiable in their gates."""

    page_index = None
    tiers = ()

    def attend(
        self,
        query: Tensor,
        tail: DecodeBuffer,
        mask: Tensor | None,
        scaling: float,
        terms: SoftmaxTerms = NO_TERMS,
    ) -> Tensor:
        """Attention [B*C, H*G, T, D] of the newest T tokens; `mask` [B*C, 1, T, M] of the tail."""
        prompt, new = (self.complete.keys, self.complete.values, self.gates), tail.arguments(mask)
        if self.soft:
            return gated_attention(query, *prompt, new, scaling, terms)
        others = None if self.evicted is None else self.evicted.estimate(query, scaling, terms, self.copies)
        if not self.stored:
            return relaxed_attention(query, *prompt, self.segment.ragged, new, scaling, others, terms)
        keys, values = zip(*self.stored, strict=True)
        return relaxed_attention(query, keys, values, self.gates, self.segment.ragged, new, scaling, others, terms)

    def row_positions(self, row: int) -> Tensor:
        """Ascending prompt positions of the entries of one row (host sync)."""
        return self.segment.row_positions(row)

    def attended(self) -> Tensor:
        """Entries [B*H] that a single token attends to, while the tail is empty."""
        return self.segment.length

    def rows(self, batch: Tensor, heads: int) -> "Relaxed":
        """Rows `batch` [B'] of the continuations, each with a prompt of its own."""
        prompts = batch // self.copies
        return Relaxed(
            self.segment.rows(batch, heads),
            self.complete.rows(prompts, heads),
            self.gates[..., prompts.to(self.gates.device), :, :],
            self.soft,
            stored=tuple(prompt.rows(prompts) for prompt in self.stored),
            evicted=None if self.evicted is None else self.evicted.rows(prompts),
        )

    def repeat(self, batch: Tensor, heads: int, repeats: int) -> "Relaxed":
        """Every continuation `repeats` times; the prompts are shared."""
        return replace(self, segment=self.segment.rows(batch, heads), copies=self.copies * repeats)

    def fork(self) -> "Relaxed":
        """The same, as nothing of it changes in place."""
        return self

    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        stored = [part for prompt in self.stored for part in prompt]
        evicted = [] if self.evicted is None else self.evicted.tensors()
        return [*self.complete.tensors(), self.gates, *self.segment.tensors(), *stored, *evicted]
