"""What rows of a comparison have in common, and cells of its tables."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar, get_args

from learnkv.evaluation.budget import WHOLE
from learnkv.evaluation.results import FULL, Estimate, Kind, budget_of, kind_of, mean_of_tasks

Row = Mapping[str, Any]
Result = TypeVar("Result", bound=Mapping[str, Any])
NEAR_ZERO = 5.0
"""Score of the full cache below which a task cannot compare policies."""
TITLES = {
    "query_agnostic": "Query-agnostic: the question is read after compression",
    "query_aware": "Query-aware: the question is compressed with the context",
}
READ = {"forced": "the correct answer is read, not generated", "choices": "the choices are read, not generated"}


class Panel(NamedTuple):
    """What rows that may be compared with each other have in common."""

    kind: Kind
    setting: str
    length: int

    @property
    def title(self) -> str:
        """A heading without the length."""
        if self.kind == "text":
            return "Text"
        return TITLES[self.setting] + (f"; {READ[self.kind]}" if self.kind in READ else "")


def panels(rows: Iterable[Row]) -> dict[Panel, list[Row]]:
    """Rows that may be compared with each other: by kind, setting and length."""
    groups: dict[Panel, list[Row]] = {}
    for row in rows:
        groups.setdefault(panel_of(row), []).append(row)
    order = get_args(Kind)
    return dict(sorted(groups.items(), key=lambda item: (order.index(item[0].kind), item[0].length, item[0].setting)))


def answerable(results: Iterable[Result]) -> list[Result]:
    """Rows or records without the tasks whose score with the full cache is near 0: such scores compare no policies.

    Everything where a kind, setting and length has no other task; only generated scores are left out.
    """
    listed = list(results)
    full: dict[Panel, dict[str, list[float]]] = {}
    for result in listed:
        if result["policy"] == FULL and kind_of(result) == "generated":
            full.setdefault(panel_of(result), {}).setdefault(result["task"], []).append(result["score"])
    failed = {
        panel: {task for task, scores in tasks.items() if fmean(scores) < NEAR_ZERO} for panel, tasks in full.items()
    }
    left_out = {panel: tasks for panel, tasks in failed.items() if len(tasks) < len(full[panel])}
    return [each for each in listed if each["task"] not in left_out.get(panel_of(each), ())]


def panel_of(result: Mapping[str, Any]) -> Panel:
    """The panel of a row or record."""
    return Panel(kind_of(result), result["setting"], result["length"])


def budget_label(row: Row) -> str:
    """The budget of a row or record as the heading of a column."""
    return str(budget_of(row))


def is_whole(row: Row) -> bool:
    """Whether a row is about a cache that was asked to keep every entry, at whatever precision."""
    return budget_of(row) == WHOLE


def by_axis(rows: Iterable[Row]) -> dict[bool, list[Row]]:
    """Rows of budgets of entries (False) and of bytes (True), each with the full cache's.

    Where there are budgets of bytes, policies that keep every entry and have none are beside them.
    """
    listed = list(rows)
    in_bytes = {row["policy"] for row in listed if budget_of(row).bytes is not None}
    groups: dict[bool, list[Row]] = {False: [], True: []}
    for row in listed:
        if row["policy"] == FULL:
            continue
        whole = is_whole(row) and row["policy"] not in in_bytes
        groups[bool(in_bytes) and (whole or budget_of(row).bytes is not None)].append(row)
    full = [row for row in listed if row["policy"] == FULL]
    return {axis: [*full, *group] for axis, group in groups.items() if group} or {False: full}


def size(count: float) -> str:
    """Bytes with a unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} B"


def score_of(rows: Sequence[Row]) -> Estimate:
    """Mean over the tasks of one policy at one budget."""
    return mean_of_tasks(Estimate(row["score"], _number(row["stderr"]), row["n"]) for row in rows)


def mean(rows: Sequence[Row], key: str) -> float:
    """Mean of a column over tasks."""
    values: list[float] = [row[key] for row in rows]
    return sum(values) / len(rows)


def grouped(rows: Iterable[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by policy, then by budget, the largest first."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in sorted(rows, key=_by_budget):
        groups.setdefault(row["policy"], {}).setdefault(budget_label(row), []).append(row)
    return groups


def budget_labels(rows: Iterable[Row]) -> list[str]:
    """The headings of the columns of these rows, the largest budget first."""
    return list(dict.fromkeys(budget_label(row) for row in sorted(rows, key=_by_budget)))


def _by_budget(row: Row) -> tuple[int, float]:
    return budget_of(row).order


def _number(stderr: float | None) -> float:
    return float("nan") if stderr is None else stderr


def plus_minus(value: Estimate, sign: str = "", digits: int = 1) -> str:
    """A mean with its standard error, where there is one."""
    spread = "" if value.stderr != value.stderr else f" ± {value.stderr:.{digits}f}"
    return f"{value.mean:{sign}.{digits}f}{spread}"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, then an empty line."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    yield ""
