"""How many entries a budget keeps, and which of them every policy keeps."""

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.core.page_selector import PageSelector
from learnkv.core.protection import Protection, tokens_in
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


def check_read(evicts: bool, pages: PageSelector | None, read: float | None) -> None:
    """Raise unless `read` is a fraction for a policy that evicts and reads pages of the rest, and None for others."""
    if (read is not None) != (evicts and pages is not None) or (read is not None and not 0 < read <= 1):
        raise UserError(f"read={read}: expected a fraction, above 0 and at most 1, with a scorer and pages, else none")


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


class Protected(NamedTuple):
    """What every policy keeps of each row, in every head."""

    edges: Sequence[int]
    """Sinks and recent tokens of each row."""
    counts: Sequence[int]
    """All protected entries per head of each row."""
    spans: Tensor | None = None
    """[B, P] True for prompt positions that are protected besides; None: there are none."""

    @classmethod
    def of_edges(cls, edges: Sequence[int]) -> "Protected":
        """Sinks and recent tokens alone."""
        return cls(edges, edges)


def protected_per_head(
    sinks: int,
    recent: int,
    lengths: Sequence[int],
    totals: Sequence[int],
    heads: int,
    protection: Protection | None = None,
) -> Protected:
    """Protected entries of each row: its spans, then sinks and recent tokens up to half of what they leave.

    Spans after anchors come last: in their order, up to their share of the budget and to what is left of it.

    Args:
        lengths: tokens of each row.
        totals: entries to keep in each row over all `heads` heads.
        protection: spans of each row; None: there are none.

    Raises:
        UserError: for a budget below the spans of a row.
    """
    if protection is None:
        return Protected.of_edges(
            [min(sinks + recent, total // (2 * heads), n) for total, n in zip(totals, lengths, strict=True)]
        )
    edges, masks = list[int](), list[Tensor]()
    for row, (total, n) in enumerate(zip(totals, lengths, strict=True)):
        asked, per_head = tokens_in(protection.spans[row]), total // heads
        if asked > per_head:
            raise UserError(
                f"protect: {asked} tokens of row {row} are protected, its budget keeps {total / heads:.1f} entries per "
                "head: raise it, or protect less"
            )
        edges.append(min(sinks + recent, (per_head - asked) // 2, n))
        masks.append(_spans_mask(protection, row, n, per_head, _edges(n, edges[-1], sinks, recent)))
    counts = [
        int((mask | _edges(n, edge, sinks, recent)).sum()) for mask, n, edge in zip(masks, lengths, edges, strict=True)
    ]
    spans = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)
    return Protected(edges, counts, spans)


def _edges(n: int, count: int, sinks: int, recent: int) -> Tensor:
    """[n] True for the sinks and recent tokens that `protected_entries` marks, on the CPU."""
    positions = torch.arange(n, device="cpu")
    length, protected = (torch.tensor(number, device="cpu") for number in (n, count))
    return protected_entries(positions, positions >= 0, length, protected, recent, sinks)


def _spans_mask(protection: Protection, row: int, n: int, per_head: int, edges: Tensor) -> Tensor:
    """[n] True for the tokens of spans, and for those after anchors as far as the budget of the row goes."""
    mask = torch.zeros(n, dtype=torch.bool, device="cpu")
    for begin, end in protection.spans[row]:
        mask[begin:end] = True
    left = min(int(protection.share * per_head), per_head - int((mask | edges).sum()))
    for begin, end in protection.after_anchors[row]:
        new = (~(mask | edges)[begin:end]).nonzero()[:left, 0] + begin
        mask[new] = True
        left -= len(new)
    return mask


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


def with_spans(always: Tensor, positions: Tensor, valid: Tensor, spans: Tensor | None) -> Tensor:
    """Mask [B, H, S] of protected entries, with those of `spans`.

    Args:
        always: [B, H, S] sinks and recent tokens.
        positions, valid: [B, H, S] as of `protected_entries`.
        spans: [B, P] by prompt position, on the same device.
    """
    if spans is None:
        return always
    last = spans.shape[1] - 1
    in_span = spans.unsqueeze(1).expand(-1, positions.shape[1], -1).gather(2, positions.clamp(0, last))
    return always | (in_span & valid & (positions <= last))
