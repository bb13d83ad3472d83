"""What to keep of a prompt."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Plan:
    """What to keep of a prompt, before anything is kept."""

    scores: Tensor
    """[L, B, H, S] float32; +inf protected, -inf no entry."""
    wanted: Tensor
    """[L, B, H] entries as the allocator asks for them, differentiable."""
    budgets: Tensor
    """[L, B, H] int64, each row sums to its budget exactly."""
    protected: Tensor
    """[B] entries per head that every policy keeps: sinks and most recent."""
    total: int
    """Sum of `budgets`, known on the host from the budget alone."""
