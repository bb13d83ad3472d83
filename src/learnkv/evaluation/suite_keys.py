"""The keys of `learnkv eval` below `suite.`."""

from dataclasses import dataclass

from learnkv.errors import UserError


@dataclass(frozen=True)
class SuiteKeys:
    """Where suites of tasks take their rows from, and how their prompts are made.

    Args:
        longbench: LongBench's rows: a folder with a file per task, such as qasper.jsonl, or a hub id.
        longbench_v2: LongBench v2's rows: a file, or a hub id.
        templates: JSON or YAML file of prompt templates by task, as LongBench's dataset2prompt.json; default: wording
            of our own.
        max_new_tokens: most tokens of an answer, where a task would allow more.
    """

    longbench: str | None = None
    longbench_v2: str | None = None
    templates: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"suite.max_new_tokens={self.max_new_tokens}: expected at least 1")
