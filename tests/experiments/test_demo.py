"""The demo on the reference model, which is always there."""

from pathlib import Path

import pytest

from experiments.demo import PROG, QUESTIONS, demo
from learnkv.cli.parser import run_main

WORDS = ["model=reference", "ckpt=reference", "tokens=300", "bytes=0.2"]


def test_questions_are_answered_from_every_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(demo, [*WORDS, "samples=0", f"output={tmp_path}"], "eval", PROG) == 0
    out = capsys.readouterr().out
    assert "| question | full cache | reference@K4V3 | snapkv@K4V3 |" in out
    assert f"right answers of {len(QUESTIONS)}: full cache " in out
    assert all(f"| {question}{prefix} … | " in out for question, prefix, _ in QUESTIONS)
    assert out.count("right: ") + out.count("wrong: ") == 3 * len(QUESTIONS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("bytes=0", "bytes=0 tokens=300 samples=0: expected a fraction above 0"),
        ("precision=K5V3", "precision=K5V3: expected 16, 8, 4, 3, 2 bits"),
        ("tokens=10000000", "tokens=10000000: expected at most"),
        ("ckpt=refrence", "ckpt=refrence: expected"),
        ("model=smollm3", "model=smollm3"),
    ],
)
def test_bad_input_is_one_line(word: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(demo, [*WORDS, "samples=0", word], "eval", PROG) == 2
    assert line in capsys.readouterr().err
