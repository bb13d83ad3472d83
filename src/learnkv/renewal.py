"""When a cache that is added to evicts again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from learnkv.observation import Recording


@dataclass(frozen=True)
class Renewal:
    """What a policy has agreed with a cache that stays within its budget while tokens are added."""

    every: int
    """Slots of the tail at which it is joined to what is retained, and all of that judged anew."""
    budget: tuple[int, ...]
    """Entries that each row of the batch may hold in all its heads, the tail apart."""
    held: tuple[int, ...]
    """Entries that each row holds in all its heads, the tail apart."""
    recording: Recording
    """What is recorded of new tokens."""
    renew: Callable[[Any], None]
    """Brings the cache that it is given back to its budget."""

    def rows(self, batch: Tensor) -> "Renewal":
        """The same for batch rows `batch` [B']."""
        budget, held = (tuple(part[int(row)] for row in batch) for part in (self.budget, self.held))
        return replace(self, budget=budget, held=held)
