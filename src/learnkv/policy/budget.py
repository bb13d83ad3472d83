"""How many entries a budget buys, and which of them every policy keeps."""

from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
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


def protected_entries(
    positions: Tensor, valid: Tensor, length: Tensor, protected: Tensor, recent: int, sinks: int
) -> Tensor:
    """True for the `protected` entries that are kept in any case: the last `recent` tokens, then the first ones.

    Args:
        positions: [..., S] prompt position of each entry.
        valid: [..., S] False where there is no entry.
        length, protected: of each row, [..., 1].
        sinks: 0: of the first tokens none.
    """
    last = protected.clamp(max=recent)
    first = (positions < protected - last) & (sinks > 0)
    return (first | (positions >= length - last)) & valid
