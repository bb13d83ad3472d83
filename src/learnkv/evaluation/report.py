"""`results.md`: tables of a comparison."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from learnkv.evaluation.results import FULL, Estimate, Record, estimate, mean_of_tasks, paired_difference

Row = Mapping[str, Any]
TITLES = {
    "query_agnostic": "Query-agnostic: the question is read after compression",
    "query_aware": "Query-aware: the question is compressed with the context",
}
LEARNED = "learned"
EVERY_TASK = "## Every task"


def markdown(model: str, rows: Sequence[Row], records: Sequence[Record], baselines: Mapping[str, str]) -> str:
    """Tables per setting and length: mean over tasks, learned minus heuristic paired by prompt; then every task.

    Args:
        model: name of the model.
        rows: `rows_of(records)`.
        records: finished samples.
        baselines: for a learned policy, the heuristic that it starts from.
    """
    lines = [f"# Compressed caches of {model}", ""]
    details: list[str] = []
    if not rows:
        lines += ["No sample is finished."]
    for (is_text, setting, length), chosen in panels(rows).items():
        samples = [r for r in records if ("loss" in r, r["setting"], r["length"]) == (is_text, setting, length)]
        if is_text:
            lines += [f"## Text, {length:,} tokens: KL to the full cache in nats per token", ""]
            lines += _comparison(chosen, _text_cell, "KL · perplexity")
            lines += _differences(samples, baselines, "Text: KL")
        else:
            lines += [f"## {TITLES[setting]}, {length:,} tokens", ""]
            lines += _comparison(chosen, _score_cell, "score ± standard error")
            lines += _differences(samples, baselines, TITLES[setting].split(":")[0])
            details += [f"### {TITLES[setting]}, {length:,} tokens", "", *_per_task(chosen)]
    if details:
        lines += [EVERY_TASK, "", *details]
    return "\n".join(lines).rstrip() + "\n"


def panels(rows: Iterable[Row]) -> dict[tuple[bool, str, int], list[Row]]:
    """Rows that may be compared with each other: by kind (text or not), setting and length."""
    groups: dict[tuple[bool, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kl"] is not None, row["setting"], row["length"]), []).append(row)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0], item[0][2], item[0][1])))


def budget_label(row: Row) -> str:
    """The budget of a row or record as the heading of a column."""
    return f"keep {row['keep']:g}" if row["budget"] is None else f"budget {row['budget']}"


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
    """Rows by policy, then by budget."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["policy"], {}).setdefault(budget_label(row), []).append(row)
    return groups


def _number(stderr: float | None) -> float:
    return float("nan") if stderr is None else stderr


def _score_cell(rows: Sequence[Row]) -> str:
    return f"**{_pm(score_of(rows))}** · {size(mean(rows, 'bytes'))} · {_kept(rows)}"


def _text_cell(rows: Sequence[Row]) -> str:
    row = rows[0]
    return f"**{row['kl']:.4f}** · ppl {row['perplexity']:.2f} · {size(row['bytes'])} · {_kept(rows)}"


def _kept(rows: Sequence[Row]) -> str:
    """Fraction of entries kept and, where it differs, the fraction that a decode step reads."""
    spent, read = (mean(rows, key) for key in ("spent", "read"))
    return f"{spent:.3f}" if read == spent else f"{spent:.3f} ({read:.3f} read)"


def _pm(value: Estimate, sign: str = "", digits: int = 1) -> str:
    spread = "" if value.stderr != value.stderr else f" ± {value.stderr:.{digits}f}"
    return f"{value.mean:{sign}.{digits}f}{spread}"


def _comparison(rows: Sequence[Row], cell: Callable[[Sequence[Row]], str], what: str) -> Iterator[str]:
    by_policy = grouped(rows)
    (full,) = by_policy.pop(FULL).values()
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    over = tasks[0] if len(tasks) == 1 else f"Mean over {len(tasks)} tasks ({', '.join(tasks)})"
    counts = sorted({row["n"] for row in full})
    many = " to ".join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))
    yield f"{over}, {many} {'sample' if many == '1' else 'samples'} each. Full cache: {cell(full)}."
    yield ""
    yield f"Cells: {what} · bytes held per prompt · fraction of entries kept."
    yield ""
    if not by_policy:
        return
    columns = list(dict.fromkeys(column for cells in by_policy.values() for column in cells))
    yield from table(
        ["policy", *columns],
        ([name, *(cell(cells[column]) for column in columns)] for name, cells in by_policy.items()),
    )
    for name, cells in by_policy.items():
        times = max(mean(rows, "prefills") for rows in cells.values())
        if times > 1:
            yield f"{name} reads every prompt {times:.2f} times before it evicts."
            yield ""


def _differences(records: Sequence[Record], baselines: Mapping[str, str], title: str) -> Iterator[str]:
    """Learned policies minus heuristics at the same budgets."""
    value = "kl" if "loss" in records[0] else "score"
    by_policy: dict[str, dict[tuple[Any, Any], list[Record]]] = {}
    for record in records:
        if record["policy"] != FULL:
            by_budget = by_policy.setdefault(record["policy"], {})
            by_budget.setdefault((record["keep"], record["budget"]), []).append(record)
    heuristics = [name for name in by_policy if not name.startswith(LEARNED)]
    for name in by_policy:
        if name in heuristics or not heuristics:
            continue
        yield f"### {title}: {name} minus heuristic, paired by prompt"
        yield ""
        columns = list(by_policy[name])
        rows = []
        for other in heuristics:
            label = f"{other} (it starts from this)" if baselines.get(name) == other else other
            pairs = [paired_difference(by_policy[name][c], by_policy[other][c], value) for c in columns]
            rows.append([label, *(_pm(pair, "+", 4 if value == "kl" else 1) for pair in pairs)])
        best = max if value == "score" else min
        winners = [best(heuristics, key=lambda other: _mean(by_policy[other][c], value)) for c in columns]
        rows.append(["best heuristic", *winners])
        headings = [budget_label(by_policy[name][c][0]) for c in columns]
        yield from table(["minus", *headings], rows)


def _per_task(rows: Sequence[Row]) -> Iterator[str]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    yield from table(
        ["policy", "budget", "bytes", *tasks],
        (
            [name, column, size(mean(cells, "bytes")), *(_pm(score_of([row])) for row in cells)]
            for name, columns in grouped(rows).items()
            for column, cells in columns.items()
        ),
    )


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> Iterator[str]:
    """Lines of a Markdown table, then an empty line."""
    yield f"| {' | '.join(head)} |"
    yield f"| --- |{' ---: |' * (len(head) - 1)}"
    for cells in body:
        yield f"| {' | '.join(cells)} |"
    yield ""


def _mean(records: Sequence[Record], value: str) -> float:
    by_task: dict[str, list[float]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record[value])
    return mean_of_tasks(map(estimate, by_task.values())).mean
