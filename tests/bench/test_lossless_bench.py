"""The benchmark of lossless decoding: it runs, and the page shows its figures."""

import json
from pathlib import Path

import pytest

from benchmarks import lossless

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_page_is_that_of_the_file() -> None:
    page = (ROOT / "docs" / "results" / "lossless.md").read_text(encoding="utf-8").splitlines()
    result = json.loads((ROOT / "docs" / "results" / "lossless.json").read_text(encoding="utf-8"))
    assert set(lossless.table(result)) <= set(page)
    assert len({record["policy"] for record in result["records"]}) == 6
    assert len({record["keep"] for record in result["records"]}) == 4


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "reference", "--policies", "random", "--keeps", "0.2", "--prompts", "1"]
    words += ["--length", "96", "--new", "6", "--draft", "2"]
    lossless.main([*words, "--out", str(tmp_path / "x.json")])
    (full, drafted) = json.loads((tmp_path / "x.json").read_text())["records"]
    assert (full["policy"], drafted["same_tokens"]) == ("full cache", 1)
    assert sum(drafted["accepted"]) + len(drafted["accepted"]) >= 6 - 2
    assert "| random | 0.2 |" in capsys.readouterr().out
