"""Ready-made prompts in the column layout of the hub's RULER data sets, from the hub or a local file."""

import ast
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.answers import tokenised
from learnkv.evaluation.tasks.base import Prompt

COLUMNS = ("context", "question", "answer_prefix", "answer", "task", "max_new_tokens")
FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def is_table(name: str) -> bool:
    """Whether `tasks=name` is a table rather than the name of a task."""
    return "/" in name or is_file(name)


def is_file(name: str) -> bool:
    """Whether the table is a local file."""
    return Path(name.removesuffix(".gz")).suffix in FORMATS


def prompts(config: EvalConfig, source: str, length: int, tokenizer: Any) -> list[Prompt]:
    """Prompts of up to `config.samples` rows of every task in the table, drawn by `config.seed`, in every setting.

    A hub data set has a folder of prompts per length; the prompts of a file are reported with the length in `lengths=`.
    """
    numbered = list(_samples(_rows(source, length), source, config.samples, config.seed))
    return [p for setting in config.setting for p in tokenised(numbered, setting, length, tokenizer)]


def _rows(source: str, length: int) -> Any:
    if is_file(source) != Path(source).exists():
        raise UserError(f"tasks={source}: expected a hub id or a file ending in {', '.join(FORMATS)}")
    if not is_file(source):
        return datasets.load_dataset(source, data_dir=str(length), split="test")
    return datasets.load_dataset(FORMATS[Path(source.removesuffix(".gz")).suffix], data_files=source, split="train")


def _samples(rows: Any, source: str, samples: int, seed: int) -> Iterator[tuple[int, Sample]]:
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise UserError(f"tasks={source}: expected the columns {', '.join(COLUMNS)}; {', '.join(missing)} missing")
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(rows["task"]):
        by_task.setdefault(task, []).append(index)
    for task, indices in by_task.items():
        random.Random(f"{seed}:{task}").shuffle(indices)  # a larger `samples` extends a smaller one
        for index in indices[:samples]:
            row = rows[index]
            yield (
                index,
                Sample(
                    context=row["context"],
                    question=row["question"],
                    answer_prefix=row["answer_prefix"] or "",
                    answers=_answers(row["answer"], source),
                    task=task,
                    max_new_tokens=int(row["max_new_tokens"]),
                    metric="part" if "qa" in task else "all",
                ),
            )


def _answers(cell: Any, source: str) -> list[str]:
    """A list of answers, which is text in a csv file."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = ast.literal_eval(cell)
        except (ValueError, SyntaxError):
            raise UserError(f"tasks={source}: expected a list of answers, got {cell[:60]}") from None
    return [str(answer) for answer in ([cell] if isinstance(cell, str | int) else cell)]
