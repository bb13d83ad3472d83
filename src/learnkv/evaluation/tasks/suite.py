"""Base of the suites: tasks of one benchmark with prompts in parts and a metric of their own."""

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from learnkv.data.sample import Metric, Sample
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.config import Metric as Score
from learnkv.evaluation.tasks.answers import Answers, tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.forced import Forced
from learnkv.evaluation.tasks.ruler import essay_name, template_tokens
from learnkv.evaluation.tasks.table import drawn
from learnkv.evaluation.tasks.table_files import FORMATS, Row, hub_rows, is_file, read_rows
from learnkv.evaluation.tasks.templates import Template


@dataclass(frozen=True)
class SuiteSample(Sample, ABC):
    """A sample whose output is scored by the metric of its benchmark; each of its answers is a complete one."""

    metric: Metric = "part"

    loops_decide: ClassVar[bool] = False

    @property
    def scoring(self) -> tuple[Any, ...]:
        own = {field.name for field in fields(self)} - {field.name for field in fields(Sample)}
        return *super().scoring, *(getattr(self, name) for name in sorted(own))

    @abstractmethod
    def score(self, prediction: str) -> float:
        """Score of an output, 0 to 1."""

    def complete(self, prediction: str) -> bool:
        return False


class Suite(ABC):
    """The tasks of a benchmark: `tasks=` takes the suite's name for all of them, or names of single ones."""

    name: ClassVar[str]
    tasks: ClassVar[tuple[str, ...]]
    families: ClassVar[Mapping[Score, type[Answers]]] = {"generated": Answers, "forced": Forced}
    """What measures the prompts, by `score=`."""
    essays: ClassVar[bool] = False
    """Whether its prompts are made of the essays of `haystack=`."""
    cut: ClassVar[bool] = True
    """Whether prompts that are too long are cut; those that are made to measure never are."""

    def default_tasks(self, config: EvalConfig) -> Sequence[str]:
        """The tasks that the suite's name stands for."""
        return self.tasks

    def haystack(self, config: EvalConfig) -> str | None:
        """Name of the text that surrounds what is asked for; None where there is none."""
        return None

    @abstractmethod
    def samples(self, config: EvalConfig, task: str, length: int, tokenizer: Any) -> list[tuple[int, Sample]]:
        """Up to `config.samples` numbered samples of a task.

        Args:
            length: tokens of a complete prompt with room for the answer, where the task's prompts are made to measure;
                others are cut to it afterwards.
        """


class RowSuite(Suite):
    """A suite of rows that are given: all are checked, then `config.samples` are drawn."""

    def samples(self, config: EvalConfig, task: str, length: int, tokenizer: Any) -> list[tuple[int, Sample]]:
        numbered: list[tuple[int, Sample]] = [
            (index, sample) for index, (_, sample) in enumerate(self.checked(config, task, length))
        ]
        return drawn(numbered, task, config.samples, config.seed)

    def checked(self, config: EvalConfig, task: str, length: int) -> list[tuple[Row, SuiteSample]]:
        """All rows of a task with their samples. Raises UserError for a malformed one."""
        template = self.template(config, task)
        return [(row, self.sample(config, row, task, template)) for row in self.rows(config, task, length)]

    @abstractmethod
    def rows(self, config: EvalConfig, task: str, length: int) -> Sequence[Row]:
        """The rows of a task at a length of its prompts."""

    @abstractmethod
    def template(self, config: EvalConfig, task: str) -> Template:
        """The template of a task's prompts."""

    @abstractmethod
    def sample(self, config: EvalConfig, row: Row, task: str, template: Template) -> SuiteSample:
        """The sample of a row. Raises UserError for a malformed one."""


class MadeSuite(Suite):
    """A suite of prompts that are made to measure; each is a function of the seed, the task and its number."""

    cut = False

    def haystack(self, config: EvalConfig) -> str | None:
        return essay_name(config.haystack) if self.essays else None

    def samples(self, config: EvalConfig, task: str, length: int, tokenizer: Any) -> list[tuple[int, Sample]]:
        room = length - template_tokens(tokenizer)
        numbers = range(config.samples * self.variants(config))
        return [(number, self.sample(config, task, room, tokenizer, number)) for number in numbers]

    def variants(self, config: EvalConfig) -> int:
        """Prompts for each of `config.samples`."""
        return 1

    @abstractmethod
    def sample(self, config: EvalConfig, task: str, length: int, tokenizer: Any, number: int) -> Sample:
        """The sample of a number, of at most `length` tokens without the chat template, the answer included."""


def generator(config: EvalConfig, task: str, number: int) -> random.Random:
    """Random numbers for the prompt of this number."""
    return random.Random(f"{config.seed}:{task}:{number}")


def prompts(config: EvalConfig, suite: Suite, tasks: Iterable[str], length: int, tokenizer: Any) -> list[Prompt]:
    """Prompts of a suite's tasks in every setting; the middle of those above `length` tokens is left out."""
    haystack = suite.haystack(config)
    made: list[Prompt] = []
    for task in tasks:
        numbered = suite.samples(config, task, length, tokenizer)
        for setting in config.setting:
            made += tokenised(numbered, setting, length, tokenizer, haystack, length if suite.cut else None)
    return made


def cut_notes(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each length about the prompts whose middle was left out, from the records of one policy."""
    cut: dict[int, Counter[str]] = {}
    tasks: Counter[tuple[int, str]] = Counter()
    for record in records:
        tasks[record["length"], record["task"]] += 1
        cut.setdefault(record["length"], Counter())[record["task"]] += record.get("cut_tokens", 0) > 0
    counted = {length: {task: n for task, n in counts.items() if n} for length, counts in cut.items()}
    return [
        f"Prompts above {length:,} tokens, whose middle was left out: "
        + ", ".join(f"{task} {n} of {tasks[length, task]}" for task, n in counts.items())
        for length, counts in counted.items()
        if counts
    ]


def limit(config: EvalConfig, most: int) -> int:
    """Most new tokens of an answer of a task that allows `most`."""
    return min(most, config.suite.max_new_tokens or most)


def source_of(config: EvalConfig, key: str, expected: str) -> str:
    """The value of `suite.KEY=`. Raises UserError where it is not given."""
    source: str | None = getattr(config.suite, key)
    if source is None:
        raise UserError(f"tasks={','.join(config.tasks)}: expected suite.{key}=PATH with {expected}, got none")
    return source


def rows_of(source: str, key: str, stem: str | None = None, **hub: Any) -> list[Row]:
    """Rows of a file, of the file `stem` with any known ending in a folder, or of a hub data set.

    Args:
        key: the key that gives the source, without `suite.`.
        stem: name of the file in a folder; None: a folder is refused.
        hub: options of `datasets.load_dataset`.
    """
    argument = f"suite.{key}={source}"
    path = Path(source).expanduser()
    if path.is_dir():
        file = stem and file_in(path, stem)
        if not file:
            expected = f"{stem}.jsonl or another table in this folder" if stem else "a file or a hub id"
            raise UserError(f"{argument}: expected {expected}, found none")
        return read_rows(str(file), f"suite.{key}")
    if is_file(source) and path.is_file():
        return read_rows(source, f"suite.{key}")
    if is_file(source) or source.count("/") != 1:
        raise UserError(f"{argument}: expected a folder, a hub id or a file ending in {', '.join(FORMATS)}")
    return hub_rows(source, argument, **hub)


def file_in(folder: Path, stem: str) -> Path | None:
    """The table `stem` in a folder, with any ending that can be read; None where there is none."""
    files = (folder / f"{stem}{ending}{packed}" for ending in FORMATS for packed in ("", ".gz"))
    return next((file for file in files if file.is_file()), None)
