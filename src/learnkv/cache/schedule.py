"""When a cache that tokens are added to evicts again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from learnkv.core.observation import CaptureSpec


@dataclass(frozen=True)
class EvictionSchedule:
    """Online eviction as far as the cache must know it."""

    evict_interval: int
    """Slots of the tail at which the cache evicts again."""
    budget: tuple[int, ...]
    """Most entries of each batch row over all its heads, the tail not counted."""
    kept: tuple[int, ...]
    """Entries of each batch row over all its heads, the tail not counted."""
    capture_spec: CaptureSpec
    """What is captured of new tokens."""
    evict: Callable[[Any], None]
    """Merges the tail of the given cache and evicts down to the budget."""
    deferred: bool = False
    """Whether the caller of the model calls `evict_if_due` between forward passes, as training does: the backward pass
    reads a layer's entries as they were in the forward pass."""
    wanted: Tensor | None = None
    """[L, B, H] requested entries of a student's heads, differentiable."""

    def __deepcopy__(self, _: object) -> "EvictionSchedule":
        """Itself: the copy of a cache is planned by the same policy."""
        return self

    def rows(self, batch: Tensor) -> "EvictionSchedule":
        """The same for batch rows `batch` [B']."""
        budget, kept = (tuple(part[int(row)] for row in batch) for part in (self.budget, self.kept))
        wanted = None if self.wanted is None else self.wanted[:, batch.to(self.wanted.device)]
        return replace(self, budget=budget, kept=kept, wanted=wanted)
