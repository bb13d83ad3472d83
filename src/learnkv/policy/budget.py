"""How many entries a budget keeps, and which of them every policy keeps."""

from collections.abc import Sequence
from numbers import Real

from torch import Tensor

from learnkv.errors import UserError


def check_budget(keep: float | None, budget: float | None, byte_count: float | str | None = None) -> None:
    """Raise unless exactly one of the three is given, and `keep` or `budget` in range."""
    if sum(part is not None for part in (keep, budget, byte_count)) != 1:
        raise UserError(f"keep={keep} budget={budget} bytes={byte_count}: expected exactly one of them")
    for name, value in (("keep", keep), ("budget", budget)):
        if value is not None and not isinstance(value, Real):
            raise UserError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    if keep is not None and not 0 < keep <= 1:
        raise UserError(f"keep={keep:g}: expected a fraction of the prompt's entries with 0 < keep <= 1")
    if budget is not None and not 1 <= budget < float("inf"):
        raise UserError(f"budget={budget:g}: expected at least one entry per head")


def entries_to_keep(lengths: Sequence[int], heads: int, keep: float | None, budget: float | None) -> list[int]:
    """Entries to keep in each row over all `heads` heads of all layers: keep * n * heads, rounded half to even.

    Args:
        lengths: tokens n of each row.
        keep, budget: fraction of the tokens, or entries per head; exactly one of them.
    """
    check_budget(keep, budget)
    totals = []
    for row, n in enumerate(lengths):
        exact = keep * n * heads if keep is not None else min(float(budget or 0), n) * heads
        totals.append(round(exact))
        if totals[-1] < heads:
            raise UserError(
                f"keep={keep:g}: leaves {exact / heads:.2f} entries per head of a prompt of {n} tokens (row {row}), "
                "expected at least one"
            )
    return totals


def protected_per_head(most: int, lengths: Sequence[int], totals: Sequence[int], heads: int) -> list[int]:
    """Protected entries per head of each row: `most`, clipped to half of the row's budget.

    Args:
        most: sinks and recent tokens.
        lengths: tokens of each row.
        totals: entries to keep in each row over all `heads` heads.
    """
    return [min(most, total // (2 * heads), n) for total, n in zip(totals, lengths, strict=True)]


def protected_entries(
    positions: Tensor, valid: Tensor, length: Tensor, protected: Tensor, recent: int, sinks: int
) -> Tensor:
    """Mask of the `protected` entries that are kept in any case: the last `recent` tokens, then the first ones.

    Args:
        positions: [..., S] prompt position of each entry.
        valid: [..., S] False where there is no entry.
        length, protected: of each row, [..., 1].
        sinks: 0: no first tokens.
    """
    last = protected.clamp(max=recent)
    first = (positions < protected - last) & (sinks > 0)
    return (first | (positions >= length - last)) & valid
