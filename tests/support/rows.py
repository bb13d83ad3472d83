"""A row of every suite that reads rows, and the prompts of its file."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks.longbench_v2 import COLUMNS, LETTERS
from support.models import Loaded

ROWS: Mapping[str, Mapping[str, Any]] = {
    "longbench_qasper": {"input": "Where?", "context": "In the red box.", "answers": ["red box"]},
    "longbench_v2": {
        **dict.fromkeys(COLUMNS, "text"),
        **{f"choice_{letter}": letter for letter in LETTERS},
        "answer": "B",
        "difficulty": "easy",
        "length": "short",
    },
    "babilong_qa1": {"task": "qa1", "input": "Mary went home.", "question": "Where is Mary?", "target": "kitchen"},
    "gsm8k": {"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\n#### 2"},
    "math500": {"problem": "1 + 1?", "answer": "2", "solution": "It is \\boxed{2}."},
    "aime": {"problem": "1 + 1?", "answer": "2"},
    "table": {
        "context": "The box is red.",
        "question": "Which colour?",
        "answer_prefix": " It is",
        "answer": "red",
        "task": "colour",
        "max_new_tokens": 16,
    },
}
FILES = {"longbench_qasper": "qasper.jsonl", "babilong_qa1": "0k.jsonl"}
"""Names of the files of suites that read a folder."""


def file_of(task: str, folder: Path) -> Path:
    """The file of a task's rows."""
    return folder / FILES.get(task, "rows.jsonl")


def load_rows(loaded: Loaded, task: str, folder: Path, **keys: Any) -> Sequence[tasks.Family]:
    """The families of a task whose rows are in `file_of`; with made prompts of a task that reads none."""
    file, suite, name = str(file_of(task, folder)), SuiteKeys(max_new_tokens=16), task
    if task == "table":
        name = file
    elif task in FILES:
        suite = replace(suite, **{task.partition("_")[0]: str(folder)})
    elif task in ROWS:
        suite = replace(suite, **{task: file})
    config = EvalConfig(tasks=(name,), suite=suite, **{"lengths": (500,), **keys})
    return tasks.load(config, loaded[1], 512)
