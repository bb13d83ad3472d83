"""Query-aware selection by keys: which entries of a cache a new token attends to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.observation import Observation
from learnkv.core.page_selector import PageSelector
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms, softmax

State = Mapping[str, Tensor]
"""What a selector remembers of earlier tokens in one layer; the first dimension of every tensor is the batch."""


@dataclass(frozen=True)
class Lookup:
    """What a selector may use for one token in one layer. E entries per head, in their order, the token itself last."""

    query: Tensor
    """[B, H*G, D] of the new token, after RoPE."""
    keys: Tensor
    """[B, H, E, D]; arbitrary where there is no entry."""
    logits: Tensor
    """[B, H, G, E] float32, scaled query-key products, without a soft cap; -inf where there is no entry."""
    entries: Tensor
    """[B, H] entries of every head."""
    prompt_entries: Tensor
    """[B, H] how many of them are of the prompt; they come first."""
    tokens: Tensor
    """[B] entries to read per head."""
    layer_idx: int
    """Index of the layer among the compressible ones."""
    scaling: float
    """Factor on query-key products."""
    shared: dict[str, Tensor]
    """What earlier layers have left for later ones, for the same token."""
    terms: SoftmaxTerms = NO_TERMS
    """Soft cap and sinks of the model."""

    @property
    def weights(self) -> Tensor:
        """Softmax weights [B, H, G, E] of the token, 0 where there is no entry."""
        capped = self.terms.capped(self.logits)
        if self.terms.softcap is not None:  # it would raise what is masked
            capped = capped.masked_fill(self.logits == -torch.inf, -torch.inf)
        return softmax(capped, self.terms.of_heads(self.keys.shape[1]))


class EntrySelector(Component, ABC):
    """Chooses, for every new token, the entries that it attends to, from its products with all keys. Nothing is freed.

    Keys are looked up to choose; what counts as read are the entries that take part in the attention. A row of a batch
    must read what it would read alone.
    """

    page_size: int = 1
    """Entries that are read together."""
    dense_layers: int = 0
    """Number of first layers that attend to everything."""
    aligned: bool = False
    """Whether all heads must hold the whole prompt."""
    window: int = 0
    """Number of last queries of the prompt that `begin` reads."""
    remembers: bool = False
    """Whether the state changes with each token."""

    def begin(self, obs: Observation, tokens: Tensor) -> State:
        """The state after a prompt, for an `aligned` selector; `tokens` [B] as of `Lookup`."""
        return {}

    def planned(self, entries: Tensor, tokens: Tensor) -> Tensor:
        """Entries [B, H] to read of heads with `entries` [B, H], before any token was read."""
        return entries.minimum(tokens.unsqueeze(-1))

    @abstractmethod
    def forward(self, lookup: Lookup, state: State) -> tuple[Tensor | None, State]:
        """True for the pages to read, [B, H, P] or [B, H, G, P] where query heads differ, or None: all; the new state.

        Page p holds entries p * page_size … (p + 1) * page_size - 1.
        """


AnySelector = PageSelector | EntrySelector
