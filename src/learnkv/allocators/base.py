"""How the budget is split over layers and heads."""

from abc import ABC, abstractmethod

from torch import Tensor

from learnkv.component import Component
from learnkv.observation import Observation


class Allocator(Component, ABC):
    """Says how many entries each kv head of each layer should keep; `fit` then makes the wish exact.

    `static` allocators read nothing of `scores` but its shape and which entries are valid, so that a layer can be
    evicted as soon as it has been read.
    """

    static: bool = False
    window: int = 0
    """Number of last prompt queries that `features` reads (0: none)."""

    def features(self, seen: Observation) -> Tensor | None:
        """What the allocator wants to know of one layer, [B, H, F] float32, or None."""
        return None

    @abstractmethod
    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        """Wanted entries per head, [L, B, H], non-negative; only their proportions within a row need to be right.

        Args:
            scores: [L, B, H, S]; +inf for protected entries, -inf where there is no entry.
            features: [L, B, H, F] stacked results of `features`, or None.
            budget: [B] entries per head on average, protected ones included.
        """
