"""What a layer remembers of evicted entries, and how it takes part in attention."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnkv.core.residual_store import Parts, ResidualStore
from learnkv.ops.evicted_moments import merged_attention
from learnkv.ops.softmax_terms import SoftmaxTerms


@dataclass(frozen=True)
class Evicted:
    """The summary of the evicted entries of every head of one layer."""

    store: ResidualStore
    parts: Mapping[str, Tensor]
    """[B, H, …], as stored; in training float32 with the rounding of what is stored."""

    @classmethod
    def of(
        cls, store: ResidualStore, keys: Tensor, values: Tensor, weights: Tensor, before: "Evicted | None" = None
    ) -> "Evicted":
        """Entries [B, H, S, D] with weights [B, H, S], 1 for evicted ones, and what was evicted `before`."""
        parts = store.summarise(keys, values, weights)
        if before is not None:
            parts = store.merged(before.detached, parts)
        stored = store.rounded(parts)
        if any(part.requires_grad for part in parts.values()):  # the gradient passes rounding by
            exact = {name: part + (stored[name].float() - part).detach() for name, part in parts.items()}
            return cls(store, exact)
        return cls(store, stored)

    @property
    def detached(self) -> Parts:
        """The parts without gradients."""
        return {name: part.detach() for name, part in self.parts.items()}

    def estimate(self, query: Tensor, scaling: float, terms: SoftmaxTerms, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Attention [B*C, H*G, T, D] to evicted entries and its log-sum-exp, for C continuations of each prompt."""
        parts = self.parts
        if copies > 1:
            parts = {name: part.repeat_interleave(copies, 0) for name, part in parts.items()}
        return self.store.attend(query, parts, scaling, terms)

    def added(self, output: Tensor, lse: Tensor, query: Tensor, scaling: float, terms: SoftmaxTerms) -> Tensor:
        """Attention [B, H*G, T, D] with what is estimated, from that to the kept entries and its log-sum-exp."""
        return merged_attention(output, lse, *self.estimate(query, scaling, terms))[0]

    def rows(self, batch: Tensor) -> "Evicted":
        """Of batch rows `batch` [B']."""
        return replace(self, parts={name: part[batch.to(part.device)] for name, part in self.parts.items()})

    def head_nbytes(self, head_dim: int) -> int:
        """Bytes of one head."""
        return self.store.nbytes(head_dim)

    def tensors(self) -> list[Tensor]:
        """All tensors."""
        return list(self.parts.values())


def kept_entries(scores: Tensor, budgets: Tensor) -> Tensor:
    """True for the `budgets` [...] highest scores of [..., S], ties to the lower slot, as `ops.select` chooses them."""
    order = scores.detach().argsort(dim=-1, descending=True, stable=True)
    slots = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, slots)
    return rank < budgets.unsqueeze(-1)


def evicted_entries(scores: Tensor, budgets: Tensor) -> Tensor:
    """True for the entries that are evicted by scores [..., S], -inf where there is none, and budgets [...]."""
    return ~kept_entries(scores, budgets) & (scores > -torch.inf)
