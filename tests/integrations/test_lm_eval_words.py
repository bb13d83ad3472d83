"""What can be said of lm-evaluation-harness without it: its absence, words typed wrong, the entry point."""

import sys
import tomllib
from pathlib import Path

import pytest

from learnkv.cli.main import main

MODULE = "learnkv.integrations.lm_eval"


def test_without_lm_eval_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    assert main(["lm-eval", "model_args=policy=snapkv,keep=0.1", "tasks=answers"]) == 2
    error = capsys.readouterr().err
    assert "expected lm-eval, pip install learnkv[lm-eval]" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model_args=snapkv", "model_args=snapkv: expected pretrained=MODEL,policy=NAME,keep=FRACTION"),
        ("tasks=", "tasks=: expected names of lm-eval's tasks"),
        ("include_path=nowhere", "include_path=nowhere: expected a folder"),
        ("limit=0", "limit=0: expected documents per task"),
        ("log_samples=true", "log_samples=true: expected output=FOLDER"),
        ("task=answers", "did you mean"),
    ],
)
def test_what_is_typed_wrong_is_named(word: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lm-eval", "model_args=policy=snapkv,keep=0.1", "tasks=answers", word]) == 2
    assert line in capsys.readouterr().err


def test_future_releases_find_the_model_by_its_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["lm_eval.models"] == {"learnkv": f"{MODULE}:CompressedLM"}
