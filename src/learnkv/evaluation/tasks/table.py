"""Ready-made prompts in the column layout of the hub's RULER data sets, from the hub or a local file."""

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.answers import tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.cells import answers_of, count_of, text_of
from learnkv.evaluation.tasks.table_files import FORMATS, Row, hub_rows, is_file, read_rows

T = TypeVar("T")
COLUMNS = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")


def is_table(name: str) -> bool:
    """Whether `tasks=name` is a table rather than the name of a task."""
    return "/" in name or is_file(name)


def prompts(config: EvalConfig, source: str, length: int, tokenizer: Any) -> list[Prompt]:
    """Prompts of up to `config.samples` rows of every task in the table, drawn by `config.seed`, in every setting.

    A hub data set has a folder of prompts per length; the prompts of a file are reported with the length in `lengths=`.
    """
    by_task: dict[str, list[tuple[int, Sample]]] = {}
    for index, sample in enumerate(_samples(_rows(source, length))):
        by_task.setdefault(sample.task, []).append((index, sample))
    chosen = [drawn(numbered, task, config.samples, config.seed) for task, numbered in by_task.items()]
    return [
        prompt
        for setting in config.setting
        for numbered in chosen
        for prompt in tokenised(numbered, setting, length, tokenizer, n_original=numbered.original)
    ]


def _rows(source: str, length: int) -> list[Row]:
    if is_file(source) != Path(source).is_file():
        raise UserError(f"tasks={source}: expected a hub id or a file ending in {', '.join(FORMATS)}")
    return read_rows(source) if is_file(source) else hub_rows(source, f"tasks={source}", data_dir=str(length))


class Drawn(list[T]):
    """Some of the rows of a task, which has `original` of them."""

    def __init__(self, rows: Iterable[T], original: int) -> None:
        super().__init__(rows)
        self.original = original


def drawn(rows: Iterable[T], task: str, samples: int, seed: int) -> Drawn[T]:
    """Up to `samples` of the rows of a task; a larger `samples` extends a smaller one."""
    shuffled = list(rows)
    random.Random(f"{seed}:{task}").shuffle(shuffled)
    return Drawn(shuffled[:samples], len(shuffled))


def _samples(rows: Sequence[Row]) -> Iterator[Sample]:
    """All rows, so that a malformed one is an error whether it is drawn or not."""
    for row in rows:
        row.require(*COLUMNS)
        yield _sample(row, text_of(row.cells["task"], row.column("task"), blank=False))


def _sample(row: Row, task: str) -> Sample:
    cells, where = row.cells, row.column
    return Sample(
        context=text_of(cells.get("context"), where("context"), blank=False),
        question=text_of(cells.get("question"), where("question")),
        answer_prefix=text_of(cells.get("answer_prefix"), where("answer_prefix")),
        answers=answers_of(cells.get("answer"), where("answer")),
        task=task,
        max_new_tokens=count_of(cells.get("max_new_tokens"), where("max_new_tokens")),
        metric="part" if "qa" in task else "all",
    )
