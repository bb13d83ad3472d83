"""`learnkv inspect`: the page of a text of one's own."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from support.models import Loaded

from learnkv.cli.main import main
from learnkv.evaluation.kept_entries import unpacked

CONTEXT = "Rain fell on the hills. " * 6 + "The number is 4817. " + "Nobody went out. " * 4


@pytest.fixture
def words(model_folder: Path, tmp_path: Path) -> list[str]:
    file = tmp_path / "rain.txt"
    file.write_text(CONTEXT)
    given = {"model": model_folder, "text": file, "question": "Which number?", "out": tmp_path / "x" / "rain.html"}
    return ["inspect", *(f"{key}={value}" for key, value in given.items()), "max_new_tokens=4"]


def data(tmp_path: Path) -> dict[str, Any]:
    text = (tmp_path / "x" / "rain.html").read_text()
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def test_the_page_shows_what_policies_kept_and_answered(
    words: list[str], loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--ckpt", "snapkv", "baselines=adakv", "keep=0.5,0.2"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "x" / "rain.html")
    found = data(tmp_path)
    (sample,) = found["samples"]
    ids = loaded[1](CONTEXT, add_special_tokens=False).input_ids
    assert "".join(sample["tokens"]).endswith(CONTEXT)
    assert sample["after"] == "\n\nWhich number?"
    labels = [(answer["policy"], answer["budget"]) for answer in sample["answers"]]
    assert labels == [("full", "everything"), *((p, f"keep {k}") for p in ("snapkv", "adakv") for k in (0.5, 0.2))]
    for answer in sample["answers"][1:]:
        kept = unpacked(answer)
        assert kept.shape == (2, 2, len(sample["tokens"]))
        assert kept.mean() == pytest.approx(float(answer["budget"].split()[1]), abs=0.5 / kept.size)
        assert answer["score"] is None  # there is no correct answer
    assert len(sample["tokens"]) >= len(ids)
    assert (sample["expected"], found["table"]["rows"], found["charts"]) == (None, [], [])
    assert found["command"].startswith("learnkv inspect ckpt=snapkv baselines=adakv text=")


def test_an_answer_gives_a_score_and_settings_are_shown_one_after_the_other(words: list[str], tmp_path: Path) -> None:
    settings = "setting=query_agnostic,query_aware"
    assert main([*words, "--ckpt", "snapkv", "answer=4817", "answer_prefix=It is", settings]) == 0
    agnostic, aware = data(tmp_path)["samples"]
    assert agnostic["after"] == "\n\nWhich number? It is"
    assert aware["after"] == " It is"
    assert "".join(aware["tokens"]).endswith("Which number?")
    assert agnostic["expected"] == ["4817"]
    assert all(answer["score"] in (0, 100) for answer in agnostic["answers"])
    assert [answer["budget"] for answer in agnostic["answers"]] == ["everything", "keep 0.1"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("text=", "text=: expected a file, got nothing"),
        ("text=missing.txt", "text=missing.txt: cannot be read"),
        ("question= ", "question=: expected a question, got nothing"),
        ("ckpt=", "ckpt=: expected policies, got none"),
        ("ckpt=missing.yaml", "missing.yaml"),
        ("out=page.txt", "out=page.txt: expected a file ending in .html"),
        ("out=rain.txt/page.html", "out=rain.txt: expected a folder that can be written"),
        ("max_new_tokens=0", "max_new_tokens=0: expected at least 1"),
        ("max_new_tokens=600", "the model's context is 512"),
        ("keep=2", "keep=2: expected a fraction"),
        ("bytes=none", "bytes=none: expected"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    words: list[str],
    word: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if word.startswith("ckpt") else ["ckpt=snapkv"]
    assert main([*words, *given, word]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "x" / "rain.html").exists()


def test_a_text_without_words_and_a_too_long_one_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text, message in ((" \n", "expected text, the file has none"), (CONTEXT * 9, "the model's context is 512")):
        (tmp_path / "rain.txt").write_text(text)
        assert main([*words, "ckpt=snapkv"]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x" / "rain.html").exists()
