"""RULER's tasks, generated for the model's own tokenizer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learnkv.data.ruler import NEEDLES, QA_LAYOUT, TASKS, Ruler
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.answers import tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.inference.prompt_format import format_prompt

GROUPS = {"niah": tuple(NEEDLES), "ruler": TASKS}


def tasks_named(names: Sequence[str], qa: Sequence[str]) -> list[str]:
    """RULER task names with groups expanded; a group has the QA tasks only if there are documents for them."""
    tasks = [
        task
        for name in names
        for task in GROUPS.get(name, (name,))
        if name not in GROUPS or qa or task not in QA_LAYOUT
    ]
    return list(dict.fromkeys(tasks))


def prompts(config: EvalConfig, tasks: Sequence[str], length: int, tokenizer: Any) -> list[Prompt]:
    """`config.samples` prompts of every task in every setting, at most `length` tokens with room for the answer."""
    generator = Ruler(
        tokenizer,
        length - template_tokens(tokenizer),
        seed=config.seed,
        haystack=config.haystack,
        qa=list(config.qa),
        template=config.template,
        keys=config.keys,
    )
    made: list[Prompt] = []
    for task in tasks:
        numbered = [(index, generator.sample(task, index)) for index in range(config.samples)]
        for setting in config.setting:
            made += tokenised(numbered, setting, length, tokenizer, haystack=haystack(task, config.haystack))
    return made


def template_tokens(tokenizer: Any) -> int:
    """Tokens of the chat template around a prompt."""
    head, tail, _ = format_prompt(tokenizer, "", "") if tokenizer.chat_template is not None else ("", "", "")
    return len(tokenizer(head + tail, add_special_tokens=False).input_ids)


def haystack(task: str, file: str | None) -> str | None:
    """The haystack's name in results; None for a task without one."""
    if task not in NEEDLES:
        return "noise" if task == "vt" else None
    kind = NEEDLES[task].haystack
    return essay_name(file) if kind == "essay" else kind


def essay_name(file: str | None) -> str:
    """Name of a haystack of essays in results."""
    return f"essay:{Path(file).name if file else 'pydoc_data.topics'}"
