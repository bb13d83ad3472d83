"""BABILong: facts of the bAbI tasks hidden in books (Kuratov et al. 2024, arXiv 2406.10149)."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.cells import text_of
from learnkv.evaluation.tasks.suite import RowSuite, SuiteSample, file_in, limit, rows_of, source_of
from learnkv.evaluation.tasks.table_files import Row
from learnkv.evaluation.tasks.templates import Template, template_of

PREFIX = "babilong_"
NEW_TOKENS = 20
SIZES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Thousands of tokens in the names of the files."""
_ROOMS = "bathroom bedroom garden hallway kitchen office"
_YES = "no yes"
_LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4", "qa11", "qa12", "qa13"), _ROOMS),
    "qa5": "Bill Fred Jeff Mary apple football milk",
    **dict.fromkeys(("qa6", "qa9", "qa17", "qa18"), _YES),
    "qa7": "none one three two",
    "qa8": "apple football milk nothing",
    "qa10": "maybe no yes",
    "qa14": "bedroom cinema kitchen office park school",
    "qa15": "cat mouse sheep wolf",
    "qa16": "gray green white yellow",
    "qa19": "e,e e,n e,s n,e n,n n,w s,e s,s s,w w,n w,s w,w",
    "qa20": "bedroom bored garden hungry kitchen thirsty tired",
}
LABELS = {f"qa{number}": tuple(_LABELS[f"qa{number}"].split()) for number in range(1, 21)}
"""All answers of each task."""
HINTS = {
    "qa1": "A person is where they went last.",
    "qa2": "A thing that a person took moves with the person, until they leave it somewhere.",
    "qa3": "A thing that a person took moves with the person, until they leave it somewhere.",
}
_FEW = {"qa8": "with the things and commas between them", "qa19": "with two directions such as s,e"}


@dataclass(frozen=True)
class BabilongSample(SuiteSample):
    """A question whose answer is one of its task's labels. Only the output up to its first full stop counts."""

    labels: tuple[str, ...] = ()
    asked: str = ""

    loops_decide: ClassVar[bool] = True

    def score(self, prediction: str) -> float:
        """Whether the right label is the only one that the output names and the question does not."""
        output, asked, target = (text.lower() for text in (prediction.split(".")[0], self.asked, self.answers[0]))
        labels = {label.lower() for label in self.labels}
        named = {label for label in labels if label in output} - {label for label in labels if label in asked}
        several = "," in target and target not in labels
        return float(named == ({part.strip() for part in target.split(",")} if several else {target}))

    def complete(self, prediction: str) -> bool:
        return "." in prediction


class Babilong(RowSuite):
    """Rows with the columns task, input, question and target; one file per length, such as 4k.jsonl.

    `lengths=` takes the longest file that is not longer; questions of it that are, with their instruction, are cut.
    """

    name = "babilong"
    tasks: ClassVar[tuple[str, ...]] = tuple(PREFIX + task for task in LABELS)

    def default_tasks(self, config: EvalConfig) -> tuple[str, ...]:
        """The first five tasks, those of the published comparisons."""
        return self.tasks[:5]

    def rows(self, config: EvalConfig, task: str, length: int) -> list[Row]:
        source = source_of(config, "babilong", "a folder of BABILong's files")
        return _rows(source, task.removeprefix(PREFIX), _size(source, length))

    def template(self, config: EvalConfig, task: str) -> Template:
        name = task.removeprefix(PREFIX)
        return template_of(config.suite.templates, (task, name), _template(name), {"context", "question"})

    def sample(self, config: EvalConfig, row: Row, task: str, template: Template) -> BabilongSample:
        row.require("input", "question", "target")
        context, question, target = (
            text_of(row.cells[column], row.column(column), blank=False) for column in ("input", "question", "target")
        )
        labels = LABELS[task.removeprefix(PREFIX)]
        known = {label.lower() for label in labels}
        if target.lower() not in known and not {part.strip().lower() for part in target.split(",")} <= known:
            raise UserError(f"{row.column('target')}: expected of {', '.join(labels)}, got {target[:60]}")
        return BabilongSample(
            *template.fill(context=context, question=question),
            answers=[target],
            task=task,
            max_new_tokens=limit(config, NEW_TOKENS),
            labels=labels,
            asked=question,
        )


def _size(source: str, length: int) -> str:
    """The longest size that is not above `length` tokens, of those in a folder."""
    folder = Path(source).expanduser()
    sizes = [f"{size}k" for size in SIZES if 1024 * size <= length]
    there = [size for size in sizes if not folder.is_dir() or file_in(folder, size)]
    if not there:
        raise UserError(
            f"suite.babilong={source}: expected a file such as {sizes[-1]}.jsonl in this folder, found none"
        )
    return there[-1]


def _rows(source: str, name: str, size: str) -> list[Row]:
    """The rows of a task: of a file those that name it, of the hub its split."""
    rows = rows_of(source, "babilong", size, name=size, split=name)
    if not Path(source).expanduser().exists():
        return rows
    for row in rows:
        row.require("task")
    chosen = [row for row in rows if row.cells["task"] == name]
    if not chosen:
        raise UserError(f"tasks={PREFIX}{name}: suite.babilong={source} has none of its rows at {size}")
    return chosen


def _template(name: str) -> Template:
    form = _FEW.get(name, "with one word")
    hint = f" {HINTS[name]}" if name in HINTS else ""
    return Template(
        f"The text below hides facts among sentences that do not matter.{hint}\n\nText: {{context}}\n\n",
        f"Answer the question from the facts {form}.\n\nQuestion: {{question}}\n",
        "Answer:",
    )
