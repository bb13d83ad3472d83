"""LongBench v2: questions with four choices about long documents (Bai et al. 2024, arXiv 2412.15204)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.cells import text_of
from learnkv.evaluation.tasks.choices import Choices, ChoiceSample
from learnkv.evaluation.tasks.suite import RowSuite, limit, rows_of, source_of
from learnkv.evaluation.tasks.table import drawn
from learnkv.evaluation.tasks.table_files import Row
from learnkv.evaluation.tasks.templates import Template, template_of

LETTERS = "ABCD"
NEW_TOKENS = 128
COLUMNS = ("question", *(f"choice_{letter}" for letter in LETTERS), "answer", "context", "difficulty", "length")
PARTS = {"easy": "difficulty", "hard": "difficulty", "short": "length", "medium": "length", "long": "length"}
"""Parts of the data set, and the column that names them."""
TEMPLATE = Template(
    "Here is a text, and after it a question about it.\n\n{context}\n\n",
    "Question: {question}\n(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\n"
    'Which choice is right? Reply with its letter in this form: "The correct answer is (letter)".\n\n',
    "The correct answer is",
)
_BRACKETED, _BARE = re.compile(r"The correct answer is \(([A-D])\)"), re.compile(r"The correct answer is ([A-D])")


@dataclass(frozen=True)
class LetterSample(ChoiceSample):
    """A sample whose answer is a letter in brackets."""

    def score(self, prediction: str) -> float:
        """Whether the letter that the reply gives is right."""
        letter = self._letter(prediction)
        return float(letter is not None and f"({letter})" == self.answers[0])

    def complete(self, prediction: str) -> bool:
        return _BRACKETED.search(self._reply(prediction)) is not None

    def _letter(self, prediction: str) -> str | None:
        """The first letter in brackets that the reply calls correct, else the first without brackets."""
        reply = self._reply(prediction)
        match = _BRACKETED.search(reply) or _BARE.search(reply)
        return None if match is None else match[1]

    def _reply(self, prediction: str) -> str:
        return f"{self.answer_prefix}{prediction}".replace("*", "")


class LongBenchV2(RowSuite):
    """Rows with the hub's columns; `longbench_v2` is all of them, the other tasks are parts of it."""

    name = "longbench_v2"
    tasks: ClassVar[tuple[str, ...]] = ("longbench_v2", *(f"longbench_v2_{part}" for part in PARTS))
    families: ClassVar[dict[Any, type[Answers]]] = {"generated": Answers, "forced": Choices}

    def default_tasks(self, config: EvalConfig) -> Sequence[str]:
        return (self.name,)

    def samples(self, config: EvalConfig, task: str, length: int, tokenizer: Any) -> list[tuple[int, Sample]]:
        part = task.removeprefix(self.name).removeprefix("_")
        chosen: list[tuple[int, Sample]] = [
            (index, sample)
            for index, (row, sample) in enumerate(self.checked(config, task, length))
            if not part or row.cells[PARTS[part]] == part
        ]
        if not chosen:
            raise UserError(f"tasks={task}: suite.longbench_v2={config.suite.longbench_v2} has none of these rows")
        return drawn(chosen, self.name, config.samples, config.seed)

    def rows(self, config: EvalConfig, task: str, length: int) -> list[Row]:
        return rows_of(source_of(config, "longbench_v2", "LongBench v2's rows"), "longbench_v2", split="train")

    def template(self, config: EvalConfig, task: str) -> Template:
        slots = {"context", "question", *(f"choice_{letter}" for letter in LETTERS)}
        return template_of(config.suite.templates, (self.name, "0shot"), TEMPLATE, slots)

    def sample(self, config: EvalConfig, row: Row, task: str, template: Template) -> LetterSample:
        row.require(*COLUMNS)
        cells = {column: text_of(row.cells[column], row.column(column), blank=False).strip() for column in COLUMNS}
        if cells["answer"] not in LETTERS or len(cells["answer"]) != 1:
            raise UserError(f"{row.column('answer')}: expected one of {', '.join(LETTERS)}, got {cells['answer'][:60]}")
        slots = {column: cells[column] for column in COLUMNS if column not in ("answer", "difficulty", "length")}
        return LetterSample(
            *template.fill(**slots),
            answers=[f"({cells['answer']})"],
            task=task,
            max_new_tokens=limit(config, NEW_TOKENS),
            choices=tuple(f"({letter})" for letter in LETTERS),
        )
