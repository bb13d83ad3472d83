"""A malformed row of any suite is named with file and line before a token is read, whether it would be drawn or not."""

import json
from pathlib import Path

import pytest
from support.commands import eval
from support.models import Loaded
from support.rows import ROWS, file_of, load_rows

from learnkv.errors import UserError

TEXTS = {
    "longbench_qasper": "context",
    "longbench_v2": "choice_C",
    "babilong_qa1": "input",
    "gsm8k": "question",
    "math500": "problem",
    "aime": "problem",
    "table": "question",
}
"""A column of text of each."""


def count(loaded: Loaded, task: str, folder: Path, samples: int = 1) -> int:
    return sum(len(family.prompts) for family in load_rows(loaded, task, folder, samples=samples))


@pytest.mark.parametrize("task", ROWS)
def test_a_malformed_row_is_named(task: str, loaded: Loaded, tmp_path: Path) -> None:
    row, column = ROWS[task], TEXTS[task]
    good = json.dumps(row).encode()
    lines = {
        b"": "line 4 is empty",
        json.dumps({key: value for key, value in row.items() if key != column}).encode(): f"line 4: .*{column}",
        good[:-1] + b', "x": "' + b"a" * 50_000_000 + b'"}': "line 4 has 50,0.* bytes, expected at most",
        json.dumps({**row, column: {"a": 1}}).encode(): f"line 4, column {column}: expected text",
        json.dumps({**row, column: "\udc80"}).encode(): f"line 4, column {column}: ",
        good.replace(b'"}', b'\xff"}') + b"\xff": "line 4 is not UTF-8",
        good[: len(good) // 2]: "line 4: expected JSON",
        b"[1]": "line 4: expected an object",
    }
    file = file_of(task, tmp_path)
    file.write_bytes(b"\n".join([good] * 6))
    assert count(loaded, task, tmp_path, samples=99) == 6
    for line, expected in lines.items():
        file.write_bytes(b"\n".join([good] * 3 + [line] + [good] * 2))
        with pytest.raises(UserError, match=f"{file.name}: {expected}") as caught:
            count(loaded, task, tmp_path)
        assert "\n" not in str(caught.value)


def test_nothing_is_lost_to_a_malformed_row(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, good = tmp_path / "rows.jsonl", json.dumps(ROWS["table"])
    file.write_text(f"{good}\n{good}\n")
    words = [
        f"model={model_folder}",
        "ckpt=knorm",
        f"tasks={file}",
        "lengths=64",
        "keep=0.9",
        f"output={tmp_path / 'run'}",
    ]
    assert eval(words) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    file.write_text(f"{good}\n\n{good}\n")
    capsys.readouterr()
    assert eval(words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: tasks={file}: line 2 is empty"
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
