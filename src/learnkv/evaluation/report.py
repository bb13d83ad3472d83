"""`results.md`: tables of a comparison."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from learnkv.evaluation.accepted import accepted_table
from learnkv.evaluation.budget import WHOLE, Budget
from learnkv.evaluation.panels import (
    NEAR_ZERO,
    TITLES,
    Row,
    answerable,
    budget_labels,
    grouped,
    mean,
    panel_of,
    panels,
    plus_minus,
    score_of,
    size,
    table,
)
from learnkv.evaluation.results import (
    FULL,
    Record,
    budget_of,
    estimate,
    kind_of,
    mean_of_tasks,
    paired_difference,
    prompt_key,
)

LEARNED = "learned"
EVERY_TASK = "## Every task"
MISSING = "–"
COSTS = "## Time and memory"
READ_CELLS = {
    "forced": "% of answers ranked first ± standard error · KL of the answer",
    "choices": "% of prompts whose right choice is the most likely ± standard error · KL of that choice",
}
READ_SCORES = {"forced": ", answers ranked first", "choices": ", right choice the most likely"}


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
    for panel, chosen in panels(rows).items():
        samples = [record for record in records if panel_of(record) == panel]
        heading = f"{panel.title}, {panel.length:,} tokens"
        if panel.kind == "text":
            lines += [f"## {heading}: KL to the full cache in nats per token", ""]
            lines += _comparison(chosen, _text_cell, "KL · perplexity")
            lines += _differences(samples, baselines, "Text: KL", "kl")
            continue
        counted = answerable(chosen)
        lasting = {row["task"] for row in counted}
        samples = [record for record in samples if record["task"] in lasting]
        short = TITLES[panel.setting].split(":")[0]
        lines += [f"## {heading}", "", *_impossible(chosen, counted)]
        if panel.kind in READ_CELLS:
            lines += _comparison(counted, _forced_cell, READ_CELLS[panel.kind])
            lines += _differences(samples, baselines, f"{short}, KL of the answer", "kl")
            short += READ_SCORES[panel.kind]
        else:
            lines += _comparison(counted, _score_cell, "score ± standard error")
        lines += _differences(samples, baselines, short)
        details += [f"### {heading}", "", *_per_task(chosen)]
    lines += accepted_table(rows)
    if details:
        lines += [EVERY_TASK, "", *details]
    lines += _costs(rows)
    return "\n".join(lines).rstrip() + "\n"


def _score_cell(rows: Sequence[Row]) -> str:
    return f"**{plus_minus(score_of(rows))}** · {size(mean(rows, 'bytes'))} · {_kept(rows)}"


def _forced_cell(rows: Sequence[Row]) -> str:
    kl = f"{mean(rows, 'kl'):.4f}"
    return f"**{plus_minus(score_of(rows))}** · {kl} · {size(mean(rows, 'bytes'))} · {_kept(rows)}"


def _text_cell(rows: Sequence[Row]) -> str:
    kl, perplexity, nbytes = (mean(rows, key) for key in ("kl", "perplexity", "bytes"))
    return f"**{kl:.4f}** · ppl {perplexity:.2f} · {size(nbytes)} · {_kept(rows)}"


def _kept(rows: Sequence[Row]) -> str:
    """Fraction of entries kept and, where it differs, the fraction that a decode step reads."""
    spent, read = (mean(rows, key) for key in ("spent", "read"))
    return f"{spent:.3f}" if read == spent else f"{spent:.3f} ({read:.3f} read)"


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
    columns = budget_labels(row for row in rows if row["policy"] != FULL)
    yield from table(
        ["policy", *columns],
        (
            [_with_coverage(name, cells, full), *(cell(cells[c]) if c in cells else MISSING for c in columns)]
            for name, cells in by_policy.items()
        ),
    )
    for name, cells in by_policy.items():
        times = max(mean(rows, "prefills") for rows in cells.values())
        if times > 1:
            yield f"{name} reads every prompt {times:.2f} times before it evicts."
            yield ""


def _impossible(rows: Sequence[Row], counted: Sequence[Row]) -> Iterator[str]:
    """A warning about tasks that the model cannot do; `counted` are the rows that means are over."""
    failed = [
        f"{row['task']} ({row['score']:.1f})"
        for row in rows
        if row["policy"] == FULL and kind_of(row) == "generated" and row["score"] < NEAR_ZERO
    ]
    if failed:
        alone = len(counted) == len(rows)
        yield f"**The full cache scores near 0 on {', '.join(failed)}**: this model cannot do it with everything kept,"
        yield "so these scores compare no policies." if alone else "so no mean has these scores."
        yield ""


def _with_coverage(name: str, cells: Mapping[str, Sequence[Row]], full: Sequence[Row]) -> str:
    """The policy's name, with the tasks and samples that it has where it has fewer than the full cache."""
    wanted = {row["task"]: row["n"] for row in full}
    counts = [{row["task"]: row["n"] for row in cell} for cell in cells.values()]
    if all(count == wanted for count in counts):
        return name
    least = min(counts, key=lambda count: sum(count.values()))
    tasks = "" if least.keys() == wanted.keys() else f"{', '.join(least)} only, "
    return f"{name} ({tasks}{sum(least.values())} of {sum(wanted.values())} samples)"


def _differences(
    records: Sequence[Record], baselines: Mapping[str, str], title: str, value: str = "score"
) -> Iterator[str]:
    """Learned policies minus heuristics at the same budgets."""
    by_policy: dict[str, dict[Budget, list[Record]]] = {}
    for record in records:
        if record["policy"] != FULL:
            by_policy.setdefault(record["policy"], {}).setdefault(budget_of(record), []).append(record)
    for name in by_policy:
        heuristics = _heuristics(by_policy, by_policy[name])
        if not name.startswith(LEARNED) or not heuristics:
            continue
        yield f"### {title}: {name} minus heuristic, paired by prompt"
        yield ""
        columns = list(by_policy[name])
        rows = []
        for other in heuristics:
            label = f"{other} (it starts from this)" if baselines.get(name) == other else other
            rows.append([label, *(_pair(by_policy[name][c], by_policy[other].get(c, ()), value) for c in columns)])
        winners = [_best({other: by_policy[other].get(c, []) for other in heuristics}, value) for c in columns]
        rows.append(["best heuristic", *winners])
        yield from table(["minus", *map(str, columns)], rows)


def _heuristics(by_policy: Mapping[str, Mapping[Budget, Any]], budgets: Collection[Budget]) -> list[str]:
    """Policies without training; those that keep every entry where one of `budgets` does."""
    heuristics = [name for name in by_policy if not name.startswith(LEARNED)]
    return [name for name in heuristics if by_policy[name].keys() != {WHOLE} or WHOLE in budgets]


def _pair(records: Sequence[Record], others: Sequence[Record], value: str) -> str:
    """Paired difference, for prompts that both have."""
    if not {*map(prompt_key, records)} & {*map(prompt_key, others)}:
        return MISSING
    return plus_minus(paired_difference(records, others, value), "+", 4 if value == "kl" else 1)


def _best(by_policy: Mapping[str, Sequence[Record]], value: str) -> str:
    """Name of the best of the policies that have all samples of one budget, or how many share the best value."""
    most = max(map(len, by_policy.values()))
    means = {name: _mean(records, value) for name, records in by_policy.items() if most and len(records) == most}
    if not means:
        return MISSING
    best = (max if value == "score" else min)(means.values())
    winners = [name for name, mean in means.items() if mean == best]
    return winners[0] if len(winners) == 1 else f"{len(winners)} alike"


def _per_task(rows: Sequence[Row]) -> Iterator[str]:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    yield from table(["policy", "budget", "bytes", *tasks], _task_cells(rows, tasks))


def _task_cells(rows: Sequence[Row], tasks: Sequence[str]) -> Iterator[list[str]]:
    for name, columns in grouped(rows).items():
        for column, cells in columns.items():
            scores = {row["task"]: plus_minus(score_of([row])) for row in cells}
            yield [name, column, size(mean(cells, "bytes")), *(scores.get(task, MISSING) for task in tasks)]


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    """What reading and decoding took, where it was measured."""
    timed = [row for row in rows if row.get("prefill_seconds") is not None]
    if not timed:
        return
    yield from (COSTS, "")
    yield "Prefill: seconds per prompt to read, score and evict; of a batch, which is read once for all policies, its"
    yield "share, and scores are shared by a policy's budgets. Tokens per second of a whole batch: generated, on text"
    yield "read; not known where answers of several policies are written at once (`answers=`). Peak: most memory during"
    yield "both, the model included (on a CPU of the whole process)."
    yield ""
    for panel, chosen in panels(timed).items():
        yield f"### {panel.title}, {panel.length:,} tokens"
        yield ""
        yield from table(["policy", "budget", "prefill, s", "tokens/s", "peak"], _cost_cells(chosen))


def _cost_cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    for name, columns in grouped(rows).items():
        for column, cells in columns.items():
            speeds = [row["tokens_per_second"] for row in cells if row["tokens_per_second"] is not None]
            peaks = [row["peak_bytes"] for row in cells if row["peak_bytes"] is not None]
            speed = f"{sum(speeds) / len(speeds):,.0f}" if speeds else MISSING
            peak = size(max(peaks)) if peaks else MISSING
            yield [name, column, f"{mean(cells, 'prefill_seconds'):.3g}", speed, peak]


def _mean(records: Sequence[Record], value: str) -> float:
    by_task: dict[str, list[float]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record[value])
    return mean_of_tasks(map(estimate, by_task.values())).mean
