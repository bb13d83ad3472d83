"""`learnkv compress` and `learnkv ask`."""

import json
from pathlib import Path

import pytest
from support.forked import Fork

from learnkv import generate, load_cache, load_model
from learnkv.cli.main import main

RAIN = "Rain fell on the hills all day and nobody went out of the house. " * 6
QUESTION = "What is the secret number of Ada? The secret number of Ada is"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text and, below the folder `story`, a third of its cache."""
    folder = tmp_path_factory.mktemp("stored")
    (folder / "story.txt").write_text(f"{RAIN}The secret number of Ada is 4817293. {RAIN}")
    words = [f"text={folder / 'story.txt'}", "ckpt=reference", "keep=0.3", f"out={folder / 'story'}"]
    assert main(["compress", *words]) == 0
    return folder


def test_a_stored_text_answers(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {file: file.read_bytes() for file in (story / "story").iterdir()}
    for words in ([QUESTION], [f"question={QUESTION}"], ["What is x=3?", "prefix=The secret number of Ada is"]):
        assert main(["ask", str(story / "story"), *words, "max_new_tokens=9"]) == 0
        assert "4817293" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in (story / "story").iterdir()} == before


def test_bytes_and_chunks(story: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"text={story / 'story.txt'}", "ckpt=rdkv", "bytes=0.15", "chunk_size=100", f"out={story / 'bits'}"]
    assert main(["compress", *words, "protect_after=Ada is,Ben is"]) == 0
    ((span,),) = json.loads((story / "bits" / "manifest.json").read_text())["cache"]["protection"][1]
    assert span[1] - span[0] == 16
    assert "bytes kept" in capsys.readouterr().err
    assert main(["ask", str(story / "bits"), QUESTION, "max_new_tokens=9"]) == 0
    model, tokenizer = load_model("reference")
    question = tokenizer(f"\n\n{QUESTION}", return_tensors="pt", add_special_tokens=False).input_ids
    answer = generate(model, question, load_cache(story / "bits", model), max_new_tokens=9)
    assert capsys.readouterr().out.strip() == tokenizer.decode(answer[0], skip_special_tokens=True).strip()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["compress", "text=none.txt", "ckpt=snapkv", "keep=0.1", "out=x"], "none.txt: cannot be read"),
        (["compress", "ckpt=snapkv", "keep=0.1", "out=x"], "text=: expected a path"),
        (["compress", "text=none.txt", "keep=0.1", "out=x"], "ckpt=: expected a path"),
        (["ask", "nowhere"], 'learnkv ask FOLDER "question"'),
        (["ask", "nowhere", "why?"], "nowhere: expected a folder of learnkv.save_cache"),
        (["ask", "nowhere", "why?", "max_new_tokens=0"], "max_new_tokens=0: expected at least 1"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert line in error


def test_two_processes_ask_at_once(story: Path, tmp_path: Path) -> None:
    words = ["ask", str(story / "story"), QUESTION, "max_new_tokens=9"]
    for process in [Fork(lambda: main(words), tmp_path) for _ in range(2)]:
        done = process.wait()
        assert done.code == 0, done.err
        assert "4817293" in done.out
