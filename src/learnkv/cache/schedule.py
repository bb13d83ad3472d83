"""When a cache that is added to evicts again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from learnkv.core.observation import CaptureSpec


@dataclass(frozen=True)
class EvictionSchedule:
    """What a policy has agreed with a cache that stays within its budget while tokens are added."""

    evict_interval: int
    """Slots of the tail at which it is joined to what is retained, and all of that judged anew."""
    budget: tuple[int, ...]
    """Entries that each row of the batch may hold in all its heads, the tail apart."""
    held: tuple[int, ...]
    """Entries that each row holds in all its heads, the tail apart."""
    capture_spec: CaptureSpec
    """What is recorded of new tokens."""
    renew: Callable[[Any], None]
    """Brings the cache that it is given back to its budget."""
    student: bool = False
    """Whether what is evicted must wait until all layers have read: what a student attended to is looked at again for
    its gradient, and who reads it calls `evict_if_due` in between."""
    wanted: Tensor | None = None
    """[L, B, H] entries that the heads of a student are to have, differentiable."""

    def __deepcopy__(self, _: object) -> "EvictionSchedule":
        """Itself, so that the copy of a cache is judged by the same policy."""
        return self

    def rows(self, batch: Tensor) -> "EvictionSchedule":
        """The same for batch rows `batch` [B']."""
        budget, held = (tuple(part[int(row)] for row in batch) for part in (self.budget, self.held))
        wanted = None if self.wanted is None else self.wanted[:, batch.to(self.wanted.device)]
        return replace(self, budget=budget, held=held, wanted=wanted)
