"""The fidelity report: a table of what compression changes, and limits that a run must keep."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from learnkv.errors import RunError, UserError
from learnkv.evaluation.panels import Row, budget_label, table
from learnkv.evaluation.results import FIDELITY, FULL

TASK = "fidelity"
HEAD = ("policy", "budget", "KL", "top-1 flips, %", "token agreement, %", "length drift, %", "quoted verbatim, %")
ROUNDING = 1e-3
"""Of the fraction kept: a budget is a whole number of entries."""


@dataclass(frozen=True)
class Gate:
    """Limits on the fidelity of every policy; exit code 1 where a mean over the prompts is beyond one.

    Args:
        keep: budgets that keep at least this fraction of the entries must stay within the limits.
        kl: largest KL from the full cache, in nats per token.
        flips: largest percentage of next tokens that change.
        agreement: smallest percentage of generated tokens that are the full cache's.
        length_drift: largest change of the generated length in percent, longer or shorter.
        quote: most percentage points that quotes may lose against the full cache.
    """

    keep: float = 0.5
    kl: float | None = None
    flips: float | None = None
    agreement: float | None = None
    length_drift: float | None = None
    quote: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise UserError(f"gate.keep={self.keep:g}: expected a fraction above 0 and at most 1")
        if all(limit is None for limit in (self.kl, self.flips, self.agreement, self.length_drift, self.quote)):
            raise UserError("gate: expected a limit, such as gate.kl=0.05, got none")

    def check(self, rows: Sequence[Row]) -> None:
        """Raise RunError with all rows of the fidelity report that are beyond a limit, or if it has no row to check."""
        checked = [row for row in rows if row["task"] == TASK and row["policy"] != FULL and self._applies(row)]
        if not checked:
            raise RunError(f"gate.keep={self.keep:g}: no policy keeps as much, so nothing was checked")
        if failures := [text for row in checked for text in self._failures(row)]:
            raise RunError(f"fidelity: {'; '.join(failures)}")

    def _applies(self, row: Row) -> bool:
        return bool(row["spent"] >= self.keep - ROUNDING)

    def _failures(self, row: Row) -> Iterator[str]:
        lost = row["quote_full"] - row["quote"]
        for name, value, limit in (
            ("KL", row["kl"], self.kl),
            ("flips", row["flips"], self.flips),
            ("length drift", row["length_drift"], self.length_drift),
            ("loss of quotes", lost, self.quote),
        ):
            if limit is not None and not value <= limit:
                yield f"{row['policy']} {budget_label(row)}: {name} {value:.4g}, expected at most {limit:g}"
        if self.agreement is not None and not row["agreement"] >= self.agreement:
            value = f"token agreement {row['agreement']:.4g}, expected at least {self.agreement:g}"
            yield f"{row['policy']} {budget_label(row)}: {value}"


def fidelity_report(rows: Iterable[Row]) -> Iterator[str]:
    """Lines of a table per length; none where fidelity was not measured."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        if row["task"] == TASK and all(key in row for key in FIDELITY):
            by_length.setdefault(row["length"], []).append(row)
    for length, chosen in by_length.items():
        yield from (f"## Fidelity, {length:,} tokens", "")
        yield f"Against the full cache, means over {chosen[0]['n']} prompts. KL in nats per token. Flips: the most"
        yield "likely next token of given text is another one. Agreement and drift: of a greedy continuation, drift"
        yield "whether longer or shorter. Quoted: tokens of a passage of the compressed text up to the first wrong one."
        yield ""
        yield from table(HEAD, map(_cells, chosen))


def _cells(row: dict[str, Any] | Row) -> list[str]:
    percent = (f"{row[key]:.1f}" for key in ("flips", "agreement", "length_drift", "quote"))
    return [row["policy"], budget_label(row), f"{row['kl']:.4f}", *percent]
