"""LongBench: 16 English and 5 Chinese tasks over long documents (Bai et al. 2023, arXiv 2308.14508)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.cells import answers_of, text_of
from learnkv.evaluation.tasks.longbench_metrics import LongBenchSample
from learnkv.evaluation.tasks.longbench_prompts import CUE, TASKS
from learnkv.evaluation.tasks.suite import RowSuite, file_in, limit, rows_of, source_of
from learnkv.evaluation.tasks.table_files import Row
from learnkv.evaluation.tasks.templates import Template, template_of

PREFIX = "longbench_"
SLOTS = {"context", "input"}


class LongBench(RowSuite):
    """Rows with the columns input, context and answers, with all_classes for classification; one file per task."""

    name = "longbench"
    tasks: ClassVar[tuple[str, ...]] = tuple(PREFIX + task for task in TASKS)

    def default_tasks(self, config: EvalConfig) -> Sequence[str]:
        """The tasks whose files are in the folder; all tasks of a hub data set."""
        source = source_of(config, "longbench", "a folder of LongBench's files")
        folder = Path(source).expanduser()
        if not folder.is_dir():
            return self.tasks
        tasks = [task for task in self.tasks if file_in(folder, task.removeprefix(PREFIX))]
        if not tasks:
            raise UserError(f"suite.longbench={source}: expected files such as qasper.jsonl in this folder, found none")
        return tasks

    def rows(self, config: EvalConfig, task: str, length: int) -> list[Row]:
        name = task.removeprefix(PREFIX)
        return rows_of(source_of(config, "longbench", "a folder of LongBench's files"), "longbench", name, name=name)

    def template(self, config: EvalConfig, task: str) -> Template:
        name = task.removeprefix(PREFIX)
        return template_of(config.suite.templates, (task, name), TASKS[name].template, SLOTS)

    def sample(self, config: EvalConfig, row: Row, task: str, template: Template) -> LongBenchSample:
        row.require("input", "context", "answers")
        about = TASKS[task.removeprefix(PREFIX)]
        text = text_of(row.cells["input"], row.column("input"))
        context = text_of(row.cells["context"], row.column("context"), blank=False)
        answers = answers_of(row.cells["answers"], row.column("answers"))
        if about.measure == "retrieval" and not all(re.search(r"\d", answer) for answer in answers):
            raise UserError(f"{row.column('answers')}: expected the number of a paragraph, got {answers[0][:60]}")
        return LongBenchSample(
            *_with_cue(template.fill(context=context, input=text)),
            answers=answers,
            task=task,
            max_new_tokens=limit(config, about.new_tokens),
            chat=about.chat,
            measure=about.measure,
            first_line=about.first_line,
            classes=_classes(row) if about.measure == "classification" else (),
        )


def _with_cue(parts: Template) -> Template:
    """The parts, with the cue at the end of a few-shot question as the answer prefix."""
    cue = None if parts.answer_prefix else CUE.search(parts.question)
    return parts if cue is None else parts._replace(question=parts.question[: cue.start()], answer_prefix=cue[0])


def _classes(row: Row) -> tuple[str, ...]:
    row.require("all_classes")
    return tuple(answers_of(row.cells["all_classes"], row.column("all_classes")))
