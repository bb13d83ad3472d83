"""Mathematics with a chain of thought: GSM8K, MATH-500, AIME; what is held while the answer is written counts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from math_verify import parse, verify

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.evaluation.config import EvalConfig, Metric
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.cells import text_of
from learnkv.evaluation.tasks.forced import Forced
from learnkv.evaluation.tasks.suite import RowSuite, SuiteSample, limit, rows_of, source_of
from learnkv.evaluation.tasks.table_files import Row
from learnkv.evaluation.tasks.templates import Template, template_of

PATIENCE = 120
"""Seconds for one result: math-verify's own five are over on a busy machine, and a right result would score 0."""
NEW_TOKENS = {"gsm8k": 512, "math500": 1024, "aime": 2048}
TEMPLATE = Template(
    "Problem: {problem}\n\n",
    "Think step by step, and write the result at the end in \\boxed{}.\n\n",
    "Solution:",
)
_THOUGHT = ("<think>", "</think>")


@dataclass(frozen=True)
class MathSample(SuiteSample):
    """A problem with the LaTeX of its result. What comes after the first complete box around a result is not read."""

    loops_decide: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ("math-verify",)

    def score(self, prediction: str) -> float:
        """Whether the result is the right one, as math-verify compares them."""
        answer = _after_thought(prediction)
        end = _boxed_end(answer)
        target = _parsed(answer if end is None else answer[:end])
        return float(verify(_parsed(_boxed(self.answers[0])), target, timeout_seconds=PATIENCE))

    def complete(self, prediction: str) -> bool:
        return _boxed_end(_after_thought(prediction)) is not None


class Written(Answers):
    """Answers so long that they count: `bytes` are the most that are held while one is written."""

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """Records with `bytes` and `bytes_full`, that of a cache which keeps prompt and answer."""
        token_nbytes = cache.full_nbytes / sum(cache.lengths)
        records, _ = super().measure(model, prompts, cache, full)
        for prompt, record in zip(prompts, records, strict=True):
            tokens = len(prompt.prefill_ids) + len(prompt.suffix_ids) + record["tokens"]
            record |= {"bytes": record["held_bytes"], "bytes_full": tokens * token_nbytes}
        return records, None


class Reasoning(RowSuite):
    """Rows with the columns question or problem, and answer; MATH's solution is the text that `score=forced` reads."""

    name = "reasoning"
    tasks: ClassVar[tuple[str, ...]] = tuple(NEW_TOKENS)
    families: ClassVar[Mapping[Metric, type[Answers]]] = {"generated": Written, "forced": Forced}

    def default_tasks(self, config: EvalConfig) -> Sequence[str]:
        """The tasks whose rows are given."""
        tasks = [task for task in self.tasks if getattr(config.suite, task) is not None]
        if not tasks:
            keys = ", ".join(f"suite.{task}=PATH" for task in self.tasks)
            raise UserError(f"tasks={','.join(config.tasks)}: expected one or more of {keys}, got none")
        return tasks

    def rows(self, config: EvalConfig, task: str, length: int) -> list[Row]:
        return rows_of(source_of(config, task, "its rows"), task, **({"name": "main"} if task == "gsm8k" else {}))

    def template(self, config: EvalConfig, task: str) -> Template:
        return template_of(config.suite.templates, (task, self.name), TEMPLATE, {"problem"})

    def sample(self, config: EvalConfig, row: Row, task: str, template: Template) -> MathSample:
        columns = {name.lower(): name for name in row.cells}
        asked = next((columns[name] for name in ("problem", "question") if name in columns), "problem")
        given = columns.get("answer", "answer")
        row.require(asked, given)
        problem = text_of(row.cells[asked], row.column(asked), blank=False)
        cell = row.cells[given]
        answer = text_of(str(cell) if isinstance(cell, int) else cell, row.column(given), blank=False)
        solution, result = _worked(answer, row.column(given)) if task == "gsm8k" else ("", answer.strip())
        solution = solution or text_of(row.cells.get("solution"), row.column("solution")).strip()
        if not _parsed(_boxed(result)):
            raise UserError(f"{row.column(given)}: expected a result in LaTeX, got {result[:60]}")
        return MathSample(
            *template.fill(problem=problem),
            answers=[result],
            task=task,
            max_new_tokens=limit(config, NEW_TOKENS[task]),
            wording=solution or _boxed(result),
        )


def _worked(answer: str, where: str) -> tuple[str, str]:
    """Solution and result of a row of GSM8K, whose last line is #### and the result."""
    steps, mark, result = answer.rpartition("####")
    if not mark or not result.strip():
        raise UserError(f"{where}: expected #### and the result at the end, got {answer[-60:]!r}")
    result = result.strip().replace(",", "")
    solution = re.sub(r"<<.*?>>", "", steps).strip()  # for a calculator
    return f"{solution}\n{_boxed(result)}", result


def _boxed(result: str) -> str:
    return f"\\boxed{{{result}}}"


def _parsed(text: str) -> Any:
    """What math-verify reads; nothing where it cannot."""
    return parse(text, parsing_timeout=PATIENCE)


def _after_thought(text: str) -> str:
    """The output after its thought; nothing while the thought goes on."""
    begin, end = _THOUGHT
    return "" if begin in text and end not in text else text.rpartition(end)[2]


def _boxed_end(text: str) -> int | None:
    """Where the first complete box ends; None where there is none."""
    for match in re.finditer(r"\\boxed\s*\{", text):
        depth = 1
        for place in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                return place + 1
    return None
