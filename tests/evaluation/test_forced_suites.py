"""`score=forced` of every suite: the gold answer is read, or every choice where there are several."""

import json
from pathlib import Path

import pytest
from support.models import Loaded
from support.rows import ROWS, file_of, load_rows

from learnkv.evaluation.tasks.choices import Choices
from learnkv.evaluation.tasks.forced import Forced
from learnkv.evaluation.tasks.suites import SUITES

GOLD = {
    "longbench_qasper": " red box",
    "babilong_qa1": " kitchen",
    "gsm8k": " It is 2.\n\\boxed{2}",
    "math500": " It is \\boxed{2}.",
    "aime": " \\boxed{2}",
    "table": " red",
}
CHOICES = {
    "longbench_v2": [" (A)", " (B)", " (C)", " (D)"],
    "paraphrased_needles_meaning": None,
    "paraphrased_needles_knowledge": None,
}
MADE = ("niah_single_1", "vt", "needle_grid_single", "needle_grid_multi", "coreference_2", "instruction_survival_2")


def test_every_suite_is_here() -> None:
    tested = {*GOLD, *CHOICES, *MADE}
    assert all({suite.name, *suite.tasks} & tested for suite in SUITES.values())
    assert {*ROWS} <= tested


@pytest.mark.parametrize("task", [*GOLD, *CHOICES, *MADE])
def test_the_gold_answer_is_read(task: str, loaded: Loaded, tmp_path: Path) -> None:
    if task in ROWS:
        file_of(task, tmp_path).write_text(json.dumps(ROWS[task]))
    (family,) = load_rows(loaded, task, tmp_path, score="forced", samples=1)
    prompt, tokenizer = family.prompts[0], loaded[1]
    assert prompt.sample is not None
    if task in CHOICES:
        assert isinstance(family, Choices)
        read = [tokenizer.decode(ids) for ids in family.choice_ids(prompt)]
        assert read == (CHOICES[task] or [f" {choice}" for choice in prompt.sample.choices])
        assert f" {prompt.sample.answers[0]}" in read
        assert len(set(read)) == 4
        return
    assert isinstance(family, Forced)
    read = tokenizer.decode(family.answer_ids(prompt))
    assert len(family.answer_ids(prompt)) <= prompt.sample.max_new_tokens
    if task in GOLD:
        assert GOLD[task].startswith(read)
        assert len(read) > 4 or read == GOLD[task]
    else:
        assert prompt.sample.score(read) == 1 or len(family.answer_ids(prompt)) == prompt.sample.max_new_tokens
