"""How the budget is split over layers and heads."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_to_budget


@dataclass(frozen=True)
class Baseline:
    """What learned scores were before anything was learned, both with +inf and -inf where the scores have them."""

    scores: Tensor
    """[L, B, H, S] the heuristic's own."""
    prior: Tensor
    """[L, B, H, S] the same in the units of the learned scores."""


class Allocator(Component, ABC):
    """Says how many entries each kv head of each layer should keep; `fit` then makes the wish exact.

    `static` allocators read nothing of `scores` but its shape and which entries are valid; `causal` ones wish for a
    layer what follows from it and from those before it. With both, a layer can be evicted as soon as it has been read.
    """

    static: bool = False
    sequential: bool = False
    by_scores: bool = False
    """Whether budgets follow learned scores, measured from where these started (`split`)."""
    window: int = 0
    """Number of last prompt queries that `features` reads (0: none)."""

    @property
    def needs_scores(self) -> bool:
        """Whether budgets depend on the scores themselves, not only on where there are entries."""
        return not self.static

    def features(self, obs: Observation) -> Tensor | None:
        """What the allocator wants to know of one layer, [B, H, F] float32, or None."""
        return None

    def prior(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        """What heads are to get as far as that is known before anything is read, [L, B, H] int64 that spend the budget.

        Args:
            scores: [B, H, S] of any layer, of which is read which entries there are and which are protected.
            layers: L.
            budget: as of `forward`.
        """
        assert self.static
        batch, heads, slots = scores.shape
        blank = torch.where(scores[:, :1].isfinite(), 0.0, scores[:, :1]).expand(layers, batch, heads, slots)
        total = torch.round(budget.double() * (layers * heads)).long()
        return round_to_budget(self(blank, None, budget), entries_of(blank), total, protected_of(blank))

    def layer(self, at: int, prior: Tensor, scores: Tensor, features: Tensor | None, before: Tensor) -> Tensor:
        """Wanted entries [B, H] of layer `at`; their sum is what the layer asks for, not their proportions alone.

        Args:
            prior: [L, B, H] what `prior` gave.
            scores: [B, H, S] of this layer.
            features: [at + 1, B, H, F] results of `features` up to this layer, or None.
            before: [at, B, H] what the layers before asked for.
        """
        assert self.static
        return prior[at]

    @abstractmethod
    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        """Wanted entries per head, [L, B, H], non-negative; only their proportions within a row need to be right.

        Args:
            scores: [L, B, H, S]; +inf for protected entries, -inf where there is no entry.
            features: [L, B, H, F] stacked results of `features`, or None.
            budget: [B] entries per head on average, protected ones included.
        """

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, start: Baseline | None) -> Tensor:
        """What `forward` returns, for one that also reads where scores started; None: they are a heuristic's."""
        return self(scores, features, budget)


class SequentialAllocator(Allocator):
    """Asks for one layer after the other, whether all of them have been read or one at a time."""

    sequential = True

    @abstractmethod
    def prior(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        """[L, B, H] int64 from scores [B, H, S] of any layer and the budget [B], as of `Allocator.prior`."""

    @abstractmethod
    def layer(self, at: int, prior: Tensor, scores: Tensor, features: Tensor | None, before: Tensor) -> Tensor:
        """[B, H] entries that layer `at` asks for, from what was read of it and of the layers before it.

        Args:
            prior: [L, B, H].
            scores: [B, H, S] of this layer.
            features: [at + 1, B, H, F] up to this layer, or None.
            before: [at, B, H] entries that the layers before asked for.
        """

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        prior = self.prior(scores[0], len(scores), budget)
        wanted = prior.new_empty(0, *prior.shape[1:], dtype=torch.float64)
        for at, own in enumerate(scores):
            obs = None if features is None else features[: at + 1]
            wanted = torch.cat([wanted, self.layer(at, prior, own, obs, wanted).double().unsqueeze(0)])
        return wanted


def entries_of(scores: Tensor) -> Tensor:
    """[B] entries that every head has, from scores [L, B, H, S]."""
    return (scores[0, :, 0] > -torch.inf).sum(-1)


def protected_of(scores: Tensor) -> Tensor:
    """[B] entries that every head keeps in any case, from scores [L, B, H, S]."""
    return (scores[0, :, 0] == torch.inf).sum(-1)


def check_table(table: Tensor, scores: Tensor, argument: str, make: str, per_query_head: bool = False) -> None:
    """Raise UserError unless a table [..., L, N] has one number per kv (or query) head of scores [L, B, H, S].

    Args:
        argument: what names the table, as typed.
        make: the command that makes one for another model.
        per_query_head: N is a multiple of H.
    """
    layers, heads = scores.shape[0], scores.shape[2]
    have = tuple(table.shape[-2:])
    if have[0] != layers or (have[1] % heads if per_query_head else have[1] != heads):
        raise UserError(
            f"{argument}: made for {have[0]} layers of {have[1]} {'query' if per_query_head else 'kv'} heads, "
            f"the model has {layers} of {heads} kv heads; {make}"
        )
