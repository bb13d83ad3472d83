"""The keys of `learnkv eval` below `suite.`."""

from dataclasses import dataclass

from learnkv.errors import UserError


@dataclass(frozen=True)
class SuiteKeys:
    """Where suites of tasks take their rows from, and how their prompts are made.

    Args:
        longbench: LongBench's rows: a folder with a file per task, such as qasper.jsonl, or a hub id.
        longbench_v2: LongBench v2's rows: a file, or a hub id.
        babilong: BABILong's rows: a folder with a file per length, such as 4k.jsonl, or a hub id.
        gsm8k: GSM8K's rows: a file, or a hub id.
        math500: MATH-500's rows: a file, or a hub id.
        aime: rows of AIME with problem and answer: a file, or a hub id.
        templates: JSON or YAML file of prompt templates by task, as LongBench's dataset2prompt.json; default: wording
            of our own.
        depths: where the first needle of needle_grid is, in percent of the essays.
        needles: needles of needle_grid_multi.
        max_new_tokens: most tokens of an answer, where a task would allow more.
    """

    longbench: str | None = None
    longbench_v2: str | None = None
    babilong: str | None = None
    gsm8k: str | None = None
    math500: str | None = None
    aime: str | None = None
    templates: str | None = None
    max_new_tokens: int | None = None
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)
    needles: int = 3

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise UserError(f"suite.max_new_tokens={self.max_new_tokens}: expected at least 1")
        if self.needles < 2:
            raise UserError(f"suite.needles={self.needles}: expected at least 2")
        if not self.depths or not all(0 <= depth <= 100 for depth in self.depths):
            given = ",".join(f"{depth:g}" for depth in self.depths)
            raise UserError(f"suite.depths={given}: expected percentages of the haystack, 0 to 100")
        if len(set(self.depths)) < len(self.depths):
            raise UserError(f"suite.depths={','.join(f'{depth:g}' for depth in self.depths)}: a depth occurs twice")
