"""Cells of a table, as any program writes them: the right value or one line with file, row and column."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest

from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.cells import answers_of, count_of, text_of

ROW = {
    "context": "One is 12, the other 34.",
    "question": "\nWhich?",
    "answer_prefix": " They are",
    "answer": ["12", "34"],
    "task": "niah",
    "max_new_tokens": 8,
}


def samples(loaded: Any, file: Any) -> Any:
    config = EvalConfig(tasks=(str(file),), lengths=(64,))
    return [prompt.sample for family in tasks.load(config, loaded[1], 4096) for prompt in family.prompts]


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ("12", ["12"]),
        (" a b ", [" a b "]),
        (12, ["12"]),
        (["12", "34"], ["12", "34"]),
        ([12, "34"], ["12", "34"]),
        ([["12"], ["34"]], ["12", "34"]),
        ({"text": ["12"], "answer_start": [3]}, ["12"]),
        ({"text": "12"}, ["12"]),
        ("['12', '34']", ["12", "34"]),
        ("['12' '34']", ["12", "34"]),
        ("['it\\'s' \"o'clock\"]", ["it's", "o'clock"]),
        ("['a, b'\n 'c']", ["a, b", "c"]),
        ('["12", "34"]', ["12", "34"]),
        ("[12 34]", ["12", "34"]),
        ("[12, 34]", ["12", "34"]),
        ("array(['12', '34'], dtype=object)", ["12", "34"]),
        ("[array(['12'], dtype=object) array(['34'], dtype=object)]", ["12", "34"]),
        ("[np.str_('12'), np.int64(34)]", ["12", "34"]),
        ("{'text': array(['12'], dtype=object), 'answer_start': array([3])}", ["12"]),
        ("{'text': ['12'], 'answer_start': [3]}", ["12"]),
        ("('12', '34')", ["12", "34"]),
        ("(a) or (b)", ["(a) or (b)"]),
    ],
)
def test_answers_that_can_be_read_in_one_way(cell: Any, answers: Any) -> None:
    assert answers_of(cell, "here") == answers


@pytest.mark.parametrize(
    "cell",
    [
        None,
        "",
        "  ",
        float("nan"),
        3.5,
        12.0,
        True,
        [],
        "[]",
        ["99", ""],
        ["99", None],
        [["12", "twelve"], ["34"]],
        {"answer": "12"},
        {"text": []},
        "[]]",
        "['12'",
        "['12' ... '34']",
        "[12. 34.]",
        "[nan]",
        "[__import__('os')]",
        "{x}",
        "[" * 5000,
        "('12', ",
        "\u200b",  # scored as a space
        ["12", "\u200b\u00ad"],
        "\ud800",
    ],
)
def test_answers_that_cannot_be_scored_are_one_line(cell: Any) -> None:
    with pytest.raises(UserError, match=r"^here: expected") as caught:
        answers_of(cell, "here")
    assert len(str(caught.value)) < 250


def test_blank_text_and_counts() -> None:
    assert [text_of(cell, "here") for cell in (None, "", float("nan"), "a")] == ["", "", "", "a"]
    assert [count_of(cell, "here") for cell in (8, "8", "8.0", 8.0, np.int64(8))] == [8] * 5
    for cell in (None, "", "8.5", 0, -1, True, "many", float("nan"), float("inf"), 10**400, [8]):
        with pytest.raises(UserError, match="expected a whole number of at least 1"):
            count_of(cell, "here")
    others: list[Any] = [5, ["a"], {}]
    with pytest.raises(UserError, match="here: expected text, it has half of a surrogate pair"):
        text_of("a\ud800", "here")
    for other in others:
        with pytest.raises(UserError, match="expected text, got"):
            text_of(other, "here")


@pytest.mark.parametrize("writer", ["pandas_csv", "datasets_csv", "parquet", "parquet_to_csv", "jsonl", "json", "gz"])
def test_whoever_writes_a_table_its_answers_are_the_same(loaded: Any, tmp_path: Path, writer: Any) -> None:
    frame, file = pd.DataFrame([ROW, ROW]), tmp_path / "table[1].csv"
    lines = f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"
    if writer == "pandas_csv":
        frame.to_csv(file, index=False)
    elif writer == "datasets_csv":
        datasets.Dataset.from_list([ROW, ROW]).to_csv(file)
    elif writer == "parquet":
        frame.to_parquet(file := tmp_path / "table[1].parquet")
    elif writer == "parquet_to_csv":
        frame.to_parquet(tmp_path / "a.parquet")
        pd.read_parquet(tmp_path / "a.parquet").to_csv(file, encoding="utf-8-sig")
    elif writer == "json":
        (file := tmp_path / "table.json").write_text(json.dumps([ROW, ROW]))
    elif writer == "gz":
        (file := tmp_path / "table.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    else:
        (file := tmp_path / "table.jsonl").write_text(lines)
    for sample in samples(loaded, file):
        assert vars(sample) == {
            **{k: v for k, v in ROW.items() if k != "answer"},
            "answers": ["12", "34"],
            "metric": "all",
            "wording": "",
            "depth": None,
            "system": "",
            "chat": True,
        }


@pytest.mark.parametrize("blank", ["", "None", "nan", "<NA>"])
def test_a_blank_question_is_nothing_and_a_blank_answer_is_refused(loaded: Any, tmp_path: Path, blank: Any) -> None:
    file = tmp_path / "table.csv"
    pd.DataFrame([{**ROW, "question": blank, "answer": "12"}]).to_csv(file, index=False)
    assert samples(loaded, file)[0].question == ""
    pd.DataFrame([ROW, {**ROW, "answer": blank}]).to_csv(file, index=False)
    with pytest.raises(UserError, match=r"table.csv: line 4, column answer: expected an answer, got a blank one"):
        samples(loaded, file)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("t.jsonl", b"", "the file has none"),
        ("t.jsonl", b'{"context": "a"}\n{"conte', "line 2: expected JSON"),
        ("t.jsonl", b"{}\n[1]\n", r"line 2: expected an object with the columns, got \[1\]"),
        ("t.jsonl", b'{"context": "caf\xe9"}', "line 1 is not UTF-8"),
        ("t.csv", b"context,question\na,b,c\n", "line 2: expected 2 cells as in the header, got more"),
        ("t.csv", b"context,question\na\n", "line 2: expected 2 cells as in the header, got fewer"),
        ("t.csv", b'context,answer\n"a\nb",c\na\n', "line 4: expected 2 cells as in the header, got fewer"),
        ("t.csv", b"context,answer\na,b\n\na,b\n", "line 3 is empty"),
        ("t.jsonl", b"{}\n\n{}\n", "line 2 is empty"),
        ("t.jsonl.gz", b"\x1f\x8b\x08\x00aaaaaaaaaaaaaaaaaaaaaaaa", "cannot be read: "),
        ("t.csv", b"context,answer,answer\na,b,c\n", "the header has a column twice: context, answer, answer"),
        ("t.jsonl", b'{}\n{"answer": "a", "answer": "b"}', "line 2: expected JSON: .*key 'answer' twice"),
        ("t.json", b'[{"answer": "a", "answer": "b"}]', "expected JSON: .*key 'answer' twice"),
        ("t.csv", b'context\n"a', "line 2: unexpected end of data"),
        ("t.json", b'[{"context": ', "expected JSON"),
        (
            "t.jsonl",
            b'{}\n{"context": "' + b"a" * 50_000_000 + b'"}\n',
            "line 2 has 50,000,015 bytes, expected at most",
        ),
        ("t.parquet", b"PAR1", "cannot be read: "),
        ("t.parquet", b"", "cannot be read: "),
        ("t.jsonl.gz", b"{}", "cannot be read: "),
    ],
)
def test_defects_of_a_file_are_one_line(loaded: Any, tmp_path: Path, name: Any, content: Any, line: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"tasks=.*{name}: .*{line}|tasks=.*{name}: {line}") as caught:
        samples(loaded, tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["context", "task", "max_new_tokens", "answer"])
def test_the_column_of_a_wrong_cell_is_named(loaded: Any, tmp_path: Path, column: Any) -> None:
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(ROW)}\n{json.dumps({**ROW, column: None})}\n")
    with pytest.raises(UserError, match=f"line 2, column {column}: expected"):
        samples(loaded, tmp_path / "t.jsonl")


def test_an_answer_over_two_lines_can_be_found() -> None:
    assert Sample("", "", "", ["a\nb", "c\u2028d"], "t", 8).score("A\nB c d") == 1
