"""`learnkv merge FOLDERS out=FILES`: one table of several evaluations, as Markdown, CSV or LaTeX."""

import csv
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from learnkv.errors import UserError
from learnkv.evaluation.panels import (
    Row,
    budget_labels,
    grouped,
    mean,
    panels,
    plus_minus,
    score_of,
    size,
    table,
)
from learnkv.evaluation.report import MISSING
from learnkv.evaluation.results import FULL, SCHEMA, Kind, upgraded
from learnkv.formats.files import read_json, write_text

FORMATS = (".md", ".csv", ".tex")
RESULTS = "results.json"
COLUMNS = {"policy", "task", "length", "setting", "keep", "budget", "bytes", "n", "score", "stderr", "kl"}
"""What tables need of a row."""
_LATEX = {"±": r"$\pm$", "·": r"$\cdot$", "–": "--", "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}


CELLS: Mapping[Kind, str] = {
    "generated": "score ± standard error",
    "choices": "% of prompts whose right choice is the most likely ± standard error · KL of that choice",
    "forced": "% of answers ranked first ± standard error · KL of the answer",
    "text": "KL",
}
"""What the cells of a table hold beside bytes."""


@dataclass(frozen=True)
class MergeConfig:
    """Make one table of several evaluations.

    Args:
        folders: output folders of evaluations.
        out: files to write, by their ending .md, .csv or .tex; none: Markdown is printed.
    """

    folders: tuple[str, ...] = ()
    out: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.folders:
            raise UserError("folders=: expected folders of evaluations, got none")
        for file in self.out:
            if Path(file).suffix not in FORMATS:
                raise UserError(f"out={file}: expected a file ending in {', '.join(FORMATS)}")


class Evaluation(NamedTuple):
    """The results of a folder."""

    folder: str
    model: str
    environment: Mapping[str, str]
    rows: Sequence[Row]
    notes: Sequence[str] = ()
    """Warnings about its policies."""


def merge(config: MergeConfig, resolved: str) -> None:
    """Write or print the table."""
    evaluations = [read(folder) for folder in dict.fromkeys(config.folders)]
    texts = {".md": markdown, ".csv": csv_text, ".tex": latex}
    if not config.out:
        print(markdown(evaluations), end="")
    for note in _notes(evaluations) if config.out else ():
        print(note, file=sys.stderr)
    for file in config.out:
        print(write_text(file, texts[Path(file).suffix](evaluations)))


def read(folder: str) -> Evaluation:
    """The results of an evaluation.

    Raises:
        UserError: no results, or of another program or version.
    """
    path = Path(folder).expanduser() / RESULTS
    if not path.is_file():
        raise UserError(f"folders={folder}: expected the folder of an evaluation, it has no {RESULTS}")
    results = read_json(path)
    if not _is_evaluation(results):
        raise UserError(f"folders={folder}: expected {RESULTS} of learnkv eval (schema 1 or {SCHEMA}) with rows")
    model, environment = results["model"], results["environment"]
    rows = list(map(upgraded, results["rows"]))
    return Evaluation(folder, model, environment, rows, results.get("notes", []))


def _is_evaluation(results: Any) -> bool:
    """Whether parsed JSON is what an evaluation writes."""
    kinds = {"model": str, "environment": dict, "rows": list}
    if not isinstance(results, dict) or results.get("schema") not in range(1, SCHEMA + 1):
        return False
    if not all(results.get(key) and isinstance(results[key], kind) for key, kind in kinds.items()):
        return False
    return all(isinstance(row, dict) and row.keys() >= COLUMNS for row in results["rows"])


def markdown(evaluations: Sequence[Evaluation]) -> str:
    """Tables per setting and length."""
    lines = [f"# {_title(evaluations)}", "", *(line for note in _notes(evaluations) for line in (note, ""))]
    for kind, title, head, body in _tables(evaluations):
        lines += [f"## {title}", "", f"Cells, means over tasks: {CELLS[kind]} · bytes held per prompt.", ""]
        lines += table(head, body)
    return "\n".join(lines).rstrip() + "\n"


def latex(evaluations: Sequence[Evaluation]) -> str:
    """The same tables, for the package booktabs."""
    parts = [f"% {note}" for note in _notes(evaluations)]
    for _, title, head, body in _tables(evaluations):
        rows = [" & ".join(map(_escaped, cells)) + r" \\" for cells in (head, *body)]
        columns = f"l{'r' * (len(head) - 1)}"
        parts += [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{_escaped(title)}}}",
            rf"\begin{{tabular}}{{{columns}}}",
        ]
        parts += [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(parts)


def csv_text(evaluations: Sequence[Evaluation]) -> str:
    """A line per row of the results, with the keys of `results.json` as columns."""
    columns = dict.fromkeys(key for evaluation in evaluations for row in evaluation.rows for key in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, ["folder", "model", *columns], lineterminator="\n")
    writer.writeheader()
    for folder, model, _, rows, _ in evaluations:
        writer.writerows({"folder": folder, "model": model, **row} for row in rows)
    return file.getvalue()


def _tables(evaluations: Sequence[Evaluation]) -> Iterator[tuple[Kind, str, list[str], list[list[str]]]]:
    """Kind, title, headings and cells of every setting and length."""
    rows = [{**row, "policy": name} for evaluation in evaluations for row, name in _named(evaluation, evaluations)]
    for panel, chosen in panels(rows).items():
        tasks = list(dict.fromkeys(row["task"] for row in chosen))
        title = "KL on text, nats per token" if panel.kind == "text" else f"{panel.title}; {', '.join(tasks)}"
        columns = budget_labels(chosen)
        body = []
        for name, cells in grouped(chosen).items():
            counts = sorted({row["n"] for cell in cells.values() for row in cell})
            covered = list(dict.fromkeys(row["task"] for cell in cells.values() for row in cell))
            own = "" if covered == tasks else f" ({', '.join(covered)})"
            values = (_cell(cells[column], panel.kind) if column in cells else MISSING for column in columns)
            body.append([f"{name}{own}", "–".join(map(str, {counts[0]: 0, counts[-1]: 0})), *values])
        yield panel.kind, f"{title}; {panel.length:,} tokens", ["policy", "samples", *columns], body


def _cell(rows: Sequence[Row], kind: Kind) -> str:
    score = "" if kind == "text" else f"{plus_minus(score_of(rows))} · "
    kl = "" if kind == "generated" else f"{mean(rows, 'kl'):.4f} · "
    return f"{score}{kl}{size(mean(rows, 'bytes'))}"


def _named(evaluation: Evaluation, evaluations: Sequence[Evaluation]) -> Iterator[tuple[Row, str]]:
    """Rows with the policy's name, and with model and folder where several have that name.

    A row of the full cache that an earlier folder has, too, is left out.
    """
    suffix = f", {evaluation.model}" if len({other.model for other in evaluations}) > 1 else ""
    others = [other for other in evaluations if other.model == evaluation.model and other is not evaluation]
    earlier = [row for other in evaluations[: evaluations.index(evaluation)] if other in others for row in other.rows]
    policies = {row["policy"] for other in others for row in other.rows} - {FULL}
    for row in evaluation.rows:
        if row["policy"] == FULL and any(_values(row) == _values(other) for other in earlier):
            continue
        differs = row["policy"] == FULL and any(_cell_of(row) == _cell_of(other) for other in earlier)
        ambiguous = differs or row["policy"] in policies
        yield row, row["policy"] + suffix + (f", {evaluation.folder}" if ambiguous else "")


def _cell_of(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("policy", "task", "length", "setting", "metric"))


def _values(row: Row) -> tuple[Any, ...]:
    return (*_cell_of(row), row["n"], row["score"])


def _title(evaluations: Sequence[Evaluation]) -> str:
    return f"Compressed caches of {', '.join(dict.fromkeys(evaluation.model for evaluation in evaluations))}"


def _notes(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    """Warnings where evaluations ran under different conditions, then those of the evaluations."""
    keys = dict.fromkeys(key for evaluation in evaluations for key in evaluation.environment)
    for key in keys:
        values = {evaluation.folder: evaluation.environment.get(key) for evaluation in evaluations}
        if len(set(values.values())) > 1:
            yield f"Different {key}: {', '.join(f'{value} ({folder})' for folder, value in values.items())}."
    for evaluation in evaluations:
        yield from (f"{note} ({evaluation.folder})" for note in evaluation.notes)


def _escaped(text: str) -> str:
    """Text without LaTeX's special characters."""
    return "".join(_LATEX.get(c, f"\\{c}" if c in "_%&#${}" else c) for c in text)
