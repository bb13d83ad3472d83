"""BABILong: what an output names, and which file a length means."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.models import Loaded

from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks.babilong import LABELS, BabilongSample
from learnkv.evaluation.tasks.base import Prompt

ROW = {"task": "qa1", "input": "Rain. Mary went to the office.", "question": "Where is Mary?", "target": "office"}


def sample(task: str, target: str, asked: str) -> BabilongSample:
    return BabilongSample("c", "q", "Answer:", [target], task, 20, labels=LABELS[task], asked=asked)


@pytest.mark.parametrize(
    ("task", "target", "asked", "output", "score"),
    [
        ("qa1", "office", "Where is Mary?", " Office", 1),
        ("qa1", "office", "Where is Mary?", " the office. Or the garden", 1),
        ("qa1", "office", "Where is Mary?", " office or garden", 0),
        ("qa3", "office", "Where was it before the garden?", " the office, before the garden", 1),
        ("qa5", "Jeff", "Who did Fred give the milk to?", "Fred gave the milk to Jeff", 1),
        ("qa5", "Jeff", "Who did Fred give the milk to?", "Bill", 0),
        ("qa8", "apple,milk", "What does Mary carry?", "milk and apple", 1),
        ("qa8", "apple,milk", "What does Mary carry?", "milk", 0),
        ("qa19", "s,e", "How do you go?", "s,e", 1),
        ("qa1", "office", "Where is Mary?", "", 0),
    ],
)
def test_labels_that_an_output_names(task: str, target: str, asked: str, output: str, score: float) -> None:
    assert sample(task, target, asked).score(output) == score


def test_an_output_ends_at_its_full_stop() -> None:
    assert sample("qa1", "office", "?").complete("Office.")
    assert not sample("qa1", "office", "?").complete("Office")


def load(loaded: Loaded, folder: Path, names: str = "babilong_qa1", **keys: Any) -> list[Prompt]:
    suite = SuiteKeys(babilong=str(folder))
    config = EvalConfig(tasks=tuple(names.split(",")), suite=suite, **{"lengths": (300,), **keys})
    return [prompt for family in tasks.load(config, loaded[1], None) for prompt in family.prompts]


def test_a_length_means_the_longest_file_that_is_not_longer(loaded: Loaded, tmp_path: Path) -> None:
    for size in ("0k", "1k", "2k"):
        rows = [{**ROW, "input": f"{size}. {ROW['input']}"}, {**ROW, "task": "qa2"}]
        (tmp_path / f"{size}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for length in (300, 1024, 2000, 9000):
        (prompt,) = load(loaded, tmp_path, lengths=(length,))
        assert prompt.sample is not None
        found[length] = prompt.sample.context.partition("Text: ")[2][:2]
    assert found == {300: "0k", 1024: "1k", 2000: "1k", 9000: "2k"}


@pytest.mark.parametrize(
    ("row", "names", "line"),
    [
        ({**ROW, "target": "cellar"}, "babilong_qa1", "line 1, column target: expected of bathroom, .*, got cellar"),
        ({**ROW, "input": None}, "babilong_qa1", "line 1, column input: expected text, got a blank cell"),
        (ROW, "babilong_qa2", "tasks=babilong_qa2: suite.babilong=.* has none of its rows at 0k"),
        ({"task": "qa1"}, "babilong_qa1", "line 1: expected the columns input, question, target"),
        ({"input": "a"}, "babilong_qa1", "line 1: expected the columns task; task missing"),
    ],
)
def test_malformed_rows(loaded: Loaded, tmp_path: Path, row: dict[str, Any], names: str, line: str) -> None:
    (tmp_path / "0k.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match=line):
        load(loaded, tmp_path, names)


def test_a_folder_without_files(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a file such as 0k\.jsonl in this folder, found none"):
        load(loaded, tmp_path)
