"""LongBench's metrics against cases worked out by hand and, where they are, against those of the original program."""

import json
from pathlib import Path
from typing import Any

import pytest

from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks.longbench import LongBench
from learnkv.evaluation.tasks.longbench_metrics import METRICS, LongBenchSample, rouge_l
from learnkv.evaluation.tasks.longbench_prompts import TASKS

VECTORS = [parent / "shared/data/prompts/longbench_metric_vectors.json" for parent in Path(__file__).parents]
CLASSES = ("Date", "Other", "Other entity", "entity", "Reason")


def sample(task: str, *answers: str, classes: tuple[str, ...] = ()) -> LongBenchSample:
    about = TASKS[task]
    return LongBenchSample(
        "c", "q", "", list(answers), task, 8, measure=about.measure, first_line=about.first_line, classes=classes
    )


@pytest.mark.parametrize(
    ("task", "prediction", "answers", "score"),
    [
        ("qasper", "The red, box!", ["a red box"], 1),
        ("qasper", "red box and more", ["blue", "red box"], 2 / 3),
        ("qasper", "", ["red"], 0),
        ("triviaqa", "\n\nParis\nQuestion: more Paris", ["paris"], 1),
        ("gov_report", "", ["a report"], 0),
        ("gov_report", "...", ["a report"], 0),
        ("gov_report", "red blue green", ["red green"], 0.8),
        ("passage_count", "12 or 7", ["7"], 0.5),
        ("passage_count", "seven", ["7"], 0),
        ("passage_retrieval_en", "Paragraph 3, not 30", ["Paragraph 3"], 0.5),
        ("lcc", "# note\n\nx = 1", ["x = 1"], 0),  # the empty line is no comment
        ("lcc", "\n// note\nx = 1\ny", ["x = 2"], 0.8),
        ("lcc", "`a`", ["`a`"], 0),
        ("multifieldqa_zh", "北京大学", ["北京大学。"], 1),
        ("dureader", "北京大学很好", ["北京大学很好"], 1),
        ("passage_retrieval_zh", "段落15", ["段落15"], 1),
    ],
)
def test_metrics(task: str, prediction: str, answers: list[str], score: float) -> None:
    assert sample(task, *answers).score(prediction) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Reason", "Reason", 1),
        ("Reason or Date", "Reason", 0.5),
        ("Date", "Reason", 0),
        # "Other" is a part of the right name and goes; so the name after it is kept, and "entity" then goes.
        ("Other entity", "Other entity", 1),
        ("Reason\nDate", "Reason", 1),
    ],
)
def test_classes_that_are_named(prediction: str, answer: str, score: float) -> None:
    assert sample("trec", answer, classes=CLASSES).score(prediction) == score


def test_a_class_after_one_that_is_dropped_is_not_looked_at() -> None:
    right = sample("trec", "Other entity", classes=("Other", "entity", "Other entity"))
    assert right.score("Other entity") == 0.5


def test_sentences_longer_than_the_recursion_limit_have_a_score() -> None:
    words = " ".join(f"w{number}" for number in range(1500))
    assert rouge_l(words, words) == pytest.approx(1)


def test_every_task_has_a_metric_and_a_prompt() -> None:
    assert len(LongBench.tasks) == 21
    for task in TASKS.values():
        assert task.measure in {*METRICS, "classification"}
        assert "{context}" in task.template.context
        assert not task.template.answer_prefix.endswith(" ")


def test_the_cue_of_few_shot_examples_is_the_answer_prefix(tmp_path: Path) -> None:
    row = {"input": "Question: why ?\nType:", "context": "Question: a ?\nType: b", "answers": ["Reason"]}
    (tmp_path / "trec.jsonl").write_text(json.dumps({**row, "all_classes": ["Reason", "Date"]}) + "\n")
    config = EvalConfig(suite=SuiteKeys(longbench=str(tmp_path)))
    ((_, made),) = LongBench().samples(config, "longbench_trec", 512, None)
    assert (made.question, made.answer_prefix, made.chat) == ("\nQuestion: why ?\n", "Type:", False)
    assert made.score("Date or Reason") == 0.5


def test_every_vector_of_the_original_program_matches() -> None:
    file = next((file for file in VECTORS if file.is_file()), None)
    if file is None:
        pytest.skip("longbench_metric_vectors.json is not on this machine")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert len(content["vectors"]) == 86
    for case in content["vectors"]:
        classes = tuple(content["trec_classes"]) if case["metric"] == "classification" else ()
        assert TASKS[case["task"]].measure == case["metric"]
        score = sample(case["task"], *case["answers"], classes=classes).score(case["prediction"])
        assert score == pytest.approx(case["score"], abs=1e-6), case
