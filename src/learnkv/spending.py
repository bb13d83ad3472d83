"""How many entries a budget buys."""

from learnkv.cache import CompressedCache
from learnkv.errors import UserError


def check_budget(keep: float | None, budget: float | None) -> None:
    """Raise unless exactly one of `keep` and `budget` is given and in range."""
    if (keep is None) == (budget is None):
        raise UserError(f"keep={keep} budget={budget}: expected exactly one of them")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"keep={keep:g}: expected a fraction of the prompt's entries with 0 < keep <= 1")
    if budget is not None and not 1 <= budget < float("inf"):
        raise UserError(f"budget={budget:g}: expected at least one entry per head")


def entries_to_keep(cache: CompressedCache, heads: int, keep: float | None, budget: float | None) -> list[int]:
    """Entries to keep in each row over all `heads` heads of all layers: keep * n * heads, rounded half to even."""
    check_budget(keep, budget)
    total = []
    for row, n in enumerate(cache.prompt_lengths):
        asked = keep * n * heads if keep is not None else min(float(budget or 0), n) * heads
        total.append(round(asked))
        if total[-1] < heads:
            raise UserError(
                f"keep={keep:g}: leaves {asked / heads:.2f} entries per head of a prompt of {n} tokens (row {row}), "
                "expected at least one"
            )
    return total
