"""Ready-made prompts in the column layout of the hub's RULER data sets, from the hub or a local file."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets

from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.answers import tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.cells import answers_of, count_of, text_of
from learnkv.evaluation.tasks.table_files import FORMATS, read_rows, suffix_of
from learnkv.formats.hub_network import check_hub

COLUMNS = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")


def is_table(name: str) -> bool:
    """Whether `tasks=name` is a table rather than the name of a task."""
    return "/" in name or is_file(name)


def is_file(name: str) -> bool:
    """Whether the table is a local file."""
    return suffix_of(name) in FORMATS


def prompts(config: EvalConfig, source: str, length: int, tokenizer: Any) -> list[Prompt]:
    """Prompts of up to `config.samples` rows of every task in the table, drawn by `config.seed`, in every setting.

    A hub data set has a folder of prompts per length; the prompts of a file are reported with the length in `lengths=`.
    """
    numbered = list(_samples(_rows(source, length), source, config.samples, config.seed))
    return [p for setting in config.setting for p in tokenised(numbered, setting, length, tokenizer)]


def _rows(source: str, length: int) -> Any:
    """A sequence of rows."""
    if is_file(source) != Path(source).is_file():
        raise UserError(f"tasks={source}: expected a hub id or a file ending in {', '.join(FORMATS)}")
    if is_file(source):
        return read_rows(source)
    try:
        check_hub(f"tasks={source}")
        return datasets.load_dataset(source, data_dir=str(length), split="test")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"tasks={source}: loading it from the hub failed: {str(error).splitlines()[0]}") from None


def _samples(rows: Any, source: str, samples: int, seed: int) -> Iterator[tuple[int, Sample]]:
    """Number and content of the drawn rows; they alone are checked."""
    missing = [column for column in COLUMNS if column not in rows[0]]
    if missing:
        raise UserError(f"tasks={source}: expected the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing")
    by_task: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        by_task.setdefault(text_of(row.get("task"), _where(source, index, "task"), blank=False), []).append(index)
    for task, indices in by_task.items():
        random.Random(f"{seed}:{task}").shuffle(indices)  # a larger `samples` extends a smaller one
        for index in indices[:samples]:
            yield index, _sample(rows[index], task, source, index)


def _sample(row: Mapping[str, Any], task: str, source: str, index: int) -> Sample:
    where = {column: _where(source, index, column) for column in COLUMNS}
    return Sample(
        context=text_of(row.get("context"), where["context"], blank=False),
        question=text_of(row.get("question"), where["question"]),
        answer_prefix=text_of(row.get("answer_prefix"), where["answer_prefix"]),
        answers=answers_of(row.get("answer"), where["answer"]),
        task=task,
        max_new_tokens=count_of(row.get("max_new_tokens"), where["max_new_tokens"]),
        metric="part" if "qa" in task else "all",
    )


def _where(source: str, index: int, column: str) -> str:
    return f"tasks={source}: row {index + 1}, column {column}"
