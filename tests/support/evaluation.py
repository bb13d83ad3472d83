"""Prompts and policies of small evaluations, and the records of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from learnkv.data.sample import Sample
from learnkv.evaluation import runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.config import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.answers import Answers, tokenised
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy
from support.models import Loaded

KEEPS = [Budget(keep=0.5), Budget(keep=0.25), Budget(tokens=8)]
NAMES = ("snapkv", "adakv")


def text_prompts(rows: int, length: int = 48) -> list[Prompt]:
    tokens = torch.randint(2, 400, (rows, length), generator=torch.Generator().manual_seed(1)).tolist()
    cut = length - 13
    return [Prompt("text", length, "query_agnostic", i, ids[:cut], ids[cut:]) for i, ids in enumerate(tokens)]


def question_prompts(tokenizer: PreTrainedTokenizerBase, rows: int) -> list[Prompt]:
    samples = [Sample(f"{'Red is. ' * (i + 2)}", "\nWhat?", " It", ["zz"], "vt", 6) for i in range(rows)]
    return list(tokenised(enumerate(samples), "query_agnostic", 64, tokenizer))


def policies(*names: str) -> dict[str, Policy]:
    return {name: load_policy(name) for name in names}


def compare(
    loaded: Loaded,
    prompts: list[Prompt],
    path: Path,
    names: tuple[str, ...] = NAMES,
    keeps: list[Budget] = KEEPS,
    batch_size: int = 4,
    family: type[Any] = Text,
    answers: int | None = None,
) -> list[Mapping[str, Any]]:
    families = [family(prompts)] if family is Text else [Answers(prompts, loaded[1])]
    jobs = jobs_of(loaded[0], policies(*names), keeps)
    path.mkdir(exist_ok=True)
    store = Store(path / "samples.jsonl")
    runner.run(loaded[0], families, jobs, store, Packing(batch_size, answers=answers))
    return runner.finished(families, jobs, store)
