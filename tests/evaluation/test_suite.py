"""What all suites share: rows with file and line, prompts in parts, cut middles, templates, digests."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.commands import eval
from support.models import Loaded

from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.suite_keys import SuiteKeys
from learnkv.evaluation.tasks import table_files
from learnkv.evaluation.tasks.answers import EndOfAnswer, without_middle
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.longbench_metrics import LongBenchSample

ROW = {"input": "Where is the key?", "context": "The key is in the red box. " * 3, "answers": ["red box"]}


def load(loaded: Loaded, names: str, suite: SuiteKeys, **keys: Any) -> list[Prompt]:
    settings = {"lengths": (384,), "samples": 5, "setting": ("query_agnostic", "query_aware"), **keys}
    config = EvalConfig(tasks=tuple(names.split(",")), suite=suite, **settings)
    return [prompt for family in tasks.load(config, loaded[1], 512) for prompt in family.prompts]


@pytest.fixture
def longbench(tmp_path: Path) -> Callable[..., str]:
    """Write rows of a task; the folder."""

    def write(*rows: dict[str, Any], task: str = "qasper") -> str:
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path)

    return write


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b'{"input": "", "context": "a", "answers": ["b"]}\n\n{}\n', "line 2 is empty"),
        (
            b'{"input": "", "context": "a", "answers": ["b"]}\n{"input": "", "context": "a"}',
            "line 2: .*answers missing",
        ),
        (b'{"input": "", "context": 5, "answers": ["b"]}', "line 1, column context: expected text, got 5"),
        (b'{"input": "", "context": "a", "answers": [0.5]}', "line 1, column answers: expected text"),
        (b'{"input": "", "context": "caf\xe9", "answers": ["b"]}', "line 1 is not UTF-8"),
        (b'{"input": "' + b"a" * 50_000_000 + b'"}', "line 1 has 50,000,013 bytes, expected at most 33,554,432"),
        (b"", "expected rows, the file has none"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(
    content: bytes, line: str, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(content)
    words = [f"model={model_folder}", "ckpt=knorm", "tasks=longbench", f"suite.longbench={tmp_path}", "lengths=384"]
    assert eval([*words, f"output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(rf"suite.longbench={tmp_path}/qasper.jsonl: {line}", error), error


def test_both_settings_have_the_same_tokens_and_the_answer_prefix_is_never_compressed(
    loaded: Loaded, longbench: Callable[..., str]
) -> None:
    suite = SuiteKeys(longbench=longbench(ROW), max_new_tokens=8)
    agnostic, aware = load(loaded, "longbench_qasper", suite)
    assert agnostic.prefill_ids + agnostic.suffix_ids == aware.prefill_ids + aware.suffix_ids
    decode = loaded[1].decode
    assert decode(agnostic.prefill_ids).endswith("The key is in the red box. \n\n")
    assert decode(agnostic.suffix_ids).endswith("Question: Where is the key?\nAnswer:")
    assert decode(aware.suffix_ids) == "Answer:"


def test_the_middle_of_a_long_prompt_is_left_out_as_longbench_does() -> None:
    whole = list(range(100))
    parts, excess = without_middle([whole[:70], whole[70:95], whole[95:]], 40)
    assert [*parts[0], *parts[1], *parts[2]] == whole[:20] + whole[-20:]
    assert (excess, list(map(len, parts))) == (60, [20, 15, 5])
    assert without_middle([whole, []], 100) == ([whole, []], 0)


def test_what_was_cut_is_recorded(
    model_folder: Path, tmp_path: Path, longbench: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = longbench(ROW, {**ROW, "context": "one two three. " * 200})
    words = [f"model={model_folder}", "ckpt=knorm", "tasks=longbench", f"suite.longbench={folder}", "lengths=256"]
    assert eval([*words, "suite.max_new_tokens=4", "keep=0.5", f"output={tmp_path / 'run'}"]) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {(s["policy"], s["index"]): s["cut_tokens"] > 0 for s in samples} == {
        (policy, index): index == 1 for policy in ("full", "knorm") for index in (0, 1)
    }
    note = "Prompts above 256 tokens, whose middle was left out: longbench_qasper 1 of 2"
    assert note in (tmp_path / "run" / "results.md").read_text()
    assert note in json.loads((tmp_path / "run" / "results.json").read_text())["notes"]


def test_a_cut_prompt_fills_the_length_exactly(loaded: Loaded, longbench: Callable[..., str]) -> None:
    folder = longbench({**ROW, "context": "one two three. " * 200})
    for prompt in load(loaded, "longbench_qasper", SuiteKeys(longbench=folder, max_new_tokens=4), lengths=(256, 300)):
        assert prompt.room == prompt.length
    with pytest.raises(UserError, match="lengths=200: longbench_qasper has answers of 128 tokens, expected 256"):
        load(loaded, "longbench_qasper", SuiteKeys(longbench=folder), lengths=(200,))


@pytest.mark.parametrize(
    ("suite", "line"),
    [
        ({}, r"tasks=longbench: expected suite.longbench=PATH with a folder of LongBench's files, got none"),
        ({"longbench": "missing/folder/here"}, "suite.longbench=missing/folder/here: expected a folder, a hub id or"),
        ({"longbench": "."}, r"suite.longbench=\.: expected files such as qasper.jsonl in this folder, found none"),
    ],
)
def test_rows_that_are_not_there(
    loaded: Loaded, suite: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=line):
        load(loaded, "longbench", SuiteKeys(**suite))


def test_a_task_without_its_file_is_named(loaded: Loaded, longbench: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"expected lcc\.jsonl or another table in this folder, found none"):
        load(loaded, "longbench_lcc", SuiteKeys(longbench=longbench(ROW)))
    with pytest.raises(UserError, match="did you mean longbench_qasper"):
        load(loaded, "longbench_qaspr", SuiteKeys(longbench=longbench(ROW)))


def test_templates_of_a_benchmark_replace_ours(loaded: Loaded, longbench: Callable[..., str], tmp_path: Path) -> None:
    folder, file = longbench(ROW), tmp_path / "dataset2prompt.json"
    file.write_text(
        json.dumps({"qasper": "Read {this}.\n\n{context}\n\nAsk: {input}\n\nReply:".replace("{this}", "it")})
    )
    prompt = load(loaded, "longbench_qasper", SuiteKeys(folder, templates=str(file), max_new_tokens=8))[0]
    text = f"Read it.\n\n{ROW['context']}\n\nAsk: {ROW['input']}\n\nReply:"
    assert loaded[1].decode(prompt.prefill_ids + prompt.suffix_ids).removeprefix("<s>") == text
    assert prompt.sample is not None
    assert (prompt.sample.question, prompt.sample.answer_prefix) == (f"\n\nAsk: {ROW['input']}\n\n", "Reply:")
    parts = {"context": "{context}", "question": "{input}", "answer_prefix": " So"}
    (tmp_path / "parts.yaml").write_text(json.dumps({"longbench_qasper": parts}))
    prompt = load(
        loaded, "longbench_qasper", SuiteKeys(folder, templates=str(tmp_path / "parts.yaml"), max_new_tokens=8)
    )[0]
    assert loaded[1].decode(prompt.suffix_ids) == "Where is the key? So"


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{input}\nAnswer:", "qasper: expected the slots context, input, got input"),
        ("{context} {input} {other}", "expected the slots context, input, got context, input, other"),
        (5, "qasper: expected text, or context, question, answer_prefix, got 5"),
        ({"context": 5}, "qasper: expected text in context, question, answer_prefix"),
        ({"context": "{context}", "cue": "a"}, "expected text, or context"),
    ],
)
def test_templates_that_cannot_be_filled(
    loaded: Loaded, longbench: Callable[..., str], tmp_path: Path, template: object, line: str
) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"qasper": template}))
    with pytest.raises(UserError, match=line):
        load(
            loaded, "longbench_qasper", SuiteKeys(longbench(ROW), templates=str(tmp_path / "t.json"), max_new_tokens=8)
        )


def test_stored_samples_of_another_metric_do_not_count(loaded: Loaded, longbench: Callable[..., str]) -> None:
    def digest(**fields: Any) -> str:
        sample = LongBenchSample("c", "q", "", ["a"], "t", 4, **fields)
        family = tasks.Answers([Prompt("t", 8, "query_agnostic", 0, [1], [2], sample)], loaded[1])
        return family.prompts[0].digest

    assert digest() == digest()
    assert len({digest(), digest(measure="rouge_l"), digest(first_line=True), digest(classes=("a",))}) == 4


def test_an_answer_ends_only_where_its_score_is_known(loaded: Loaded) -> None:
    ends = EndOfAnswer(loaded[1], {1})
    words = loaded[1]("red red " * 60, add_special_tokens=False).input_ids
    f1 = LongBenchSample("c", "q", "", ["red"], "t", 500)
    assert not ends(words, f1)  # a repetition lowers F1, and so does what follows the right answer
    assert not ends(loaded[1]("red").input_ids, f1)
    line = LongBenchSample("c", "q", "", ["red"], "t", 500, first_line=True)
    assert ends(loaded[1]("\n red\nblue").input_ids, line)
    assert not ends(loaded[1]("\n red").input_ids, line)


def test_forced_answers_are_those_of_the_rows(loaded: Loaded, longbench: Callable[..., str]) -> None:
    folder = longbench({**ROW, "answers": ["red box", "box"]}, {**ROW, "answers": ["long answer " * 40]})
    config = EvalConfig(tasks=("longbench",), suite=SuiteKeys(folder, max_new_tokens=8), lengths=(384,), score="forced")
    (family,) = tasks.load(config, loaded[1], 512)
    assert isinstance(family, tasks.Forced)
    first, second = sorted(family.prompts, key=lambda prompt: prompt.index)
    assert loaded[1].decode(family.answer_ids(first)) == " red box"
    assert len(family.answer_ids(second)) == 8


@pytest.mark.parametrize(
    ("names", "key", "options", "row"),
    [
        ("longbench_qasper", "longbench", {"name": "qasper", "split": "test"}, ROW),
        ("gsm8k", "gsm8k", {"name": "main", "split": "test"}, {"question": "1 + 1?", "answer": "#### 2"}),
        ("aime", "aime", {"split": "test"}, {"problem": "1 + 1?", "answer": 2}),
        (
            "babilong_qa1",
            "babilong",
            {"name": "0k", "split": "qa1"},
            {"input": "Mary is there.", "question": "Where is Mary?", "target": "office"},
        ),
        (
            "longbench_v2",
            "longbench_v2",
            {"split": "train"},
            {
                **{f"choice_{letter}": letter for letter in "ABCD"},
                **{"question": "Which?", "answer": "A", "context": "a", "difficulty": "easy", "length": "short"},
            },
        ),
    ],
)
def test_rows_of_the_hub(
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    key: str,
    options: dict[str, str],
    row: dict[str, Any],
) -> None:
    asked: list[Any] = []

    def load_dataset(source: str, **given: Any) -> list[dict[str, Any]]:
        asked.append((source, given))
        return [row]

    monkeypatch.setattr(table_files, "check_hub", lambda argument: None)
    monkeypatch.setattr(table_files.datasets, "load_dataset", load_dataset)
    (prompt,) = load(loaded, names, SuiteKeys(**{key: "owner/name", "max_new_tokens": 8}), setting=("query_aware",))
    assert asked == [("owner/name", options)]
    assert prompt.task == names
    monkeypatch.setattr(table_files.datasets, "load_dataset", lambda *given, **more: [{"other": 1}])
    with pytest.raises(UserError, match=f"suite.{key}=owner/name: row 1: expected the columns"):
        load(loaded, names, SuiteKeys(**{key: "owner/name"}))
