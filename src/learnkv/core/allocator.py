"""How the budget is split over layers and heads."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.finite import check_shape, without_nan
from learnkv.core.observation import Observation, Statistic
from learnkv.errors import UserError
from learnkv.ops.round_to_budget import round_to_budget


@dataclass(frozen=True)
class Baseline:
    """Scores of the heuristic that a learned scorer corrects; +inf and -inf where the learned scores have them."""

    scores: Tensor
    """[L, B, H, S] the heuristic's own."""
    scaled: Tensor
    """[L, B, H, S] the same in the units of the learned scores."""


class Allocator(Component, ABC):
    """How many entries each kv head of each layer should keep; `round_to_budget` then makes that exact.

    `static` allocators read only the shape of `scores` and which entries are valid; `sequential` ones decide about a
    layer from that layer and those before it. With both, a layer can be evicted as soon as it has been read.
    """

    static: bool = False
    sequential: bool = False
    by_scores: bool = False
    """Whether budgets follow learned scores relative to their baseline (`split`)."""
    window: int = 0
    """Number of last prompt queries that `features` reads (0: none)."""
    functions: frozenset[str] = frozenset()
    """Functions of the layer that `features` applies, as of `Scorer`."""
    statistics: frozenset[Statistic] = frozenset()
    """Running results over the prompt that `features` reads; they exist for a prompt only."""
    __call__: Callable[..., Tensor]

    @property
    def needs_scores(self) -> bool:
        """Whether budgets depend on the scores themselves, not only on which entries are valid."""
        return not self.static

    def features(self, obs: Observation) -> Tensor | None:
        """Features of one layer that the allocator reads, [B, H, F] float32, or None."""
        return None

    def baseline_budgets(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        """Budgets before any layer has been read, [L, B, H] int64 that spend the budget.

        Args:
            scores: [B, H, S] of any layer; read for which entries are valid and which are protected.
            layers: L.
            budget: as of `forward`.
        """
        assert self.static
        batch, heads, slots = scores.shape
        blank = torch.where(scores[:, :1].isfinite(), 0.0, scores[:, :1]).expand(layers, batch, heads, slots)
        total = torch.round(budget.double() * (layers * heads)).long()
        wanted = self(blank, None, budget)
        check_shape(wanted, blank.shape[:3], f"{self.name}: budgets", "[L, B, H]")
        wanted = without_nan(wanted, f"{self.name}: budgets", [])
        return round_to_budget(wanted, entries_of(blank), total, protected_of(blank))

    def layer(
        self, layer_idx: int, baseline: Tensor, scores: Tensor, features: Tensor | None, earlier: Tensor
    ) -> Tensor:
        """Wanted entries [B, H] of layer `layer_idx`; their sum counts, not only their proportions.

        Args:
            baseline: [L, B, H] the result of `baseline_budgets`.
            scores: [B, H, S] of this layer.
            features: [layer_idx + 1, B, H, F] results of `features` up to this layer, or None.
            earlier: [layer_idx, B, H] wanted entries of the layers before.
        """
        assert self.static
        return baseline[layer_idx]

    @abstractmethod
    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        """Wanted entries per head, [L, B, H], non-negative; only their proportions within a row need to be right.

        Args:
            scores: [L, B, H, S]; +inf for protected entries, -inf where there is no entry.
            features: [L, B, H, F] stacked results of `features`, or None.
            budget: [B] entries per head on average, protected ones included.
        """

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None) -> Tensor:
        """The result of `forward`, for one that also reads the scores' baseline; None: they are a heuristic's."""
        return self(scores, features, budget)

    def ranking(
        self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None
    ) -> Tensor | None:
        """Scores [L, B, H, S] comparable over layers and heads, where budgets are by these; arguments as of `split`."""
        return None


class SequentialAllocator(Allocator):
    """Decides about one layer after the other, whether all of them have been read or one at a time."""

    sequential = True

    @abstractmethod
    def baseline_budgets(self, scores: Tensor, layers: int, budget: Tensor) -> Tensor:
        """[L, B, H] int64 from scores [B, H, S] of any layer and the budget [B], as of `Allocator`."""

    @abstractmethod
    def layer(
        self, layer_idx: int, baseline: Tensor, scores: Tensor, features: Tensor | None, earlier: Tensor
    ) -> Tensor:
        """Wanted entries [B, H] of layer `layer_idx`, from it and the layers before it; as of `Allocator`."""

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        baseline = self.baseline_budgets(scores[0], len(scores), budget)
        wanted = baseline.new_empty(0, *baseline.shape[1:], dtype=torch.float64)
        for layer_idx, own in enumerate(scores):
            so_far = None if features is None else features[: layer_idx + 1]
            layer = self.layer(layer_idx, baseline, own, so_far, wanted)
            wanted = torch.cat([wanted, layer.double().unsqueeze(0)])
        return wanted


def entries_of(scores: Tensor) -> Tensor:
    """[B] valid entries of every head, from scores [L, B, H, S]."""
    return (scores[0, :, 0] > -torch.inf).sum(-1)


def protected_of(scores: Tensor) -> Tensor:
    """[B] protected entries of every head, from scores [L, B, H, S]."""
    return (scores[0, :, 0] == torch.inf).sum(-1)


def check_table(table: Tensor, scores: Tensor, argument: str, make: str, per_query_head: bool = False) -> None:
    """Raise UserError unless a table [..., L, N] has one number per kv (or query) head of scores [L, B, H, S].

    Args:
        argument: the argument that names the table, as typed.
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
