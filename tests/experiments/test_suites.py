"""Suites of tasks with a page of each, as they are typed, on a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from evaluation.conftest import model_folder

from experiments.study.listed.archive import LEFT_OUT
from experiments.suites.__main__ import main
from learnkv.evaluation import measured_jobs

__all__ = ["model_folder"]


@pytest.fixture
def words(model_folder: Path, tmp_path: Path) -> list[str]:
    common = {"tasks": ["needle_grid_single"], "lengths": [200], "keep": [0.5], "samples": 1, "max_new_tokens": 4}
    keys = {
        "name": "tiny",
        "model": str(model_folder),
        "baselines": ["snapkv", "random"],
        "suite": {"depths": [0, 100]},
        "views": {"needles": 1},
        "pages": {
            "needles": {"grid": common, "aware": {**common, "setting": ["query_aware"], "keep": [0.25]}},
            "read": {"forced": {**common, "score": "forced", "baselines": ["random"]}},
        },
    }
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(keys))
    return [f"config={file}", f"output={tmp_path / 'run'}", f"out={tmp_path / 'docs'}"]


def rows_in(file: Path) -> list[dict[str, Any]]:
    """Rows without what the archive of samples leaves behind."""
    return [
        {key: value for key, value in row.items() if key not in (*LEFT_OUT, "tokens_per_second")}
        for row in json.loads(file.read_text())["rows"]
    ]


def test_pages_are_measured_once_and_written(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(words) == 0
    docs = tmp_path / "docs"
    rows = rows_in(docs / "needles.json")
    assert {(row["policy"], row["setting"]) for row in rows} == {
        (policy, setting) for policy in ("full", "snapkv", "random") for setting in ("query_agnostic", "query_aware")
    }
    assert {row["policy"] for row in json.loads((docs / "read.json").read_text())["rows"]} == {"full", "random"}
    text = (docs / "needles.md").read_text()
    assert "## Query-aware" in text
    assert "`python -m experiments.suites config=tiny` at commit" in text
    assert "## Time and memory" not in text
    assert "![needles-needles-needle_grid_single-query_agnostic.png]" in text
    assert (docs / "needles-needles-needle_grid_single-query_agnostic.png").is_file()
    page = (docs / "report.html").read_text()
    assert "needle_grid_single" in page
    assert '"samples":[{' in page  # prompts of `views`

    shutil.rmtree(tmp_path / "run")  # another machine has what was written alone
    monkeypatch.setattr(measured_jobs, "prefill", lambda *a, **k: pytest.fail("finished samples were read again"))
    assert main([*words, "views.needles=0"]) == 0
    assert rows_in(docs / "needles.json") == rows


def test_one_part_with_a_portion(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "only=read.forced", "portion=0.5", "stages=measure"]) == 0
    assert not (tmp_path / "docs").exists()
    assert not (tmp_path / "run" / "needles").exists()
    assert main([*words, "stages=write"]) == 0
    assert {file.name for file in (tmp_path / "docs").iterdir()} >= {"read.md", "read.json", "report.html"}
    assert not (tmp_path / "docs" / "needles.md").exists()


def test_the_report_has_pages_that_were_measured_elsewhere(words: list[str], tmp_path: Path) -> None:
    assert main([*words, "only=needles"]) == 0
    shutil.rmtree(tmp_path / "run")
    needles = (tmp_path / "docs" / "needles.md").read_text()
    assert main([*words, "only=read"]) == 0
    assert (tmp_path / "docs" / "needles.md").read_text() == needles
    page = (tmp_path / "docs" / "report.html").read_text()
    assert "Query-aware" in page  # of needles
    assert "the correct answer is read, not generated" in page  # of read
    samples = json.loads(page.split('"samples":', 1)[1].split("</script>")[0].rstrip().removesuffix("}"))
    assert all(answer["answer"] is not None for one in samples for answer in one["answers"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("only=needels", "only=needels: expected some of needles"),
        ("portion=0", "portion=0: expected above 0"),
        ("views.nothing=1", "views.nothing"),
        ("stages=write", "nothing has been measured yet"),
    ],
)
def test_bad_words(words: list[str], word: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, word]) == 2
    assert message in capsys.readouterr().err
