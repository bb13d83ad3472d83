"""`learnkv merge`: one table of several folders, in every format."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from learnkv.cli.main import main

ROW = {
    "metric": "generated",
    "task": "vt",
    "length": 64,
    "setting": "query_agnostic",
    "keep": 0.5,
    "budget": None,
    "bytes": 1000,
    "n": 4,
}


def row(policy: Any, score: Any, **changes: Any) -> Any:
    return {**ROW, "policy": policy, "score": score, "stderr": 1.0, "kl": None, "bytes_full": 2000, **changes}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(name: Any, rows: Any, model: Any = "tiny", torch: Any = "2.13", **more: Any) -> Any:
        (tmp_path / name).mkdir()
        results = {"schema": 1, "model": model, "environment": {"torch": torch}, "rows": rows, **more}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
        return str(tmp_path / name)

    return write


FULL = row("full", 90.0, keep=1.0, bytes=2000)


def test_folders_of_one_model_are_one_table(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    a = write("a", [FULL, row("snapkv", 50.0), row("snapkv", 20.0, keep=0.1)])
    b = write("b", [FULL, row("my_adakv", 60.0)])
    assert main(["merge", a, b]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# Compressed caches of tiny"
    assert lines[-5:] == [
        "| policy | samples | keep 1 | keep 0.5 | keep 0.1 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| full | 4 | 90.0 ± 1.0 · 2 kB | – | – |",
        "| snapkv | 4 | – | 50.0 ± 1.0 · 1 kB | 20.0 ± 1.0 · 1 kB |",
        "| my_adakv | 4 | – | 60.0 ± 1.0 · 1 kB | – |",
    ]


def test_results_of_both_versions_are_one_table(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    added = {"bytes_budget": 0.05, "asked_bytes": 100, "precision": "4", "keep": None}
    a = write("a", [FULL, row("snapkv", 50.0)])
    b = write("b", [{**FULL, "bytes_budget": None}, row("snapkv@4", 60.0, bytes=99, **added)], schema=2)
    assert main(["merge", a, b]) == 0
    assert capsys.readouterr().out.splitlines()[-5:] == [
        "| policy | samples | keep 1 | keep 0.5 | bytes 0.05 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| full | 4 | 90.0 ± 1.0 · 2 kB | – | – |",
        "| snapkv | 4 | – | 50.0 ± 1.0 · 1 kB | – |",
        "| snapkv@4 | 4 | – | – | 60.0 ± 1.0 · 99 B |",
    ]


def test_markdown_csv_and_latex_are_written(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write("a", [FULL, row("snapkv", 50.0)]), write("b", [FULL, row("my_adakv", 60.0)])
    files = [str(tmp_path / f"out/merged{suffix}") for suffix in (".md", ".csv", ".tex")]
    assert main(["merge", f"folders={a},{b}", f"out={','.join(files)}"]) == 0
    assert capsys.readouterr().out.split() == files
    assert "| my_adakv | 4 |" in (tmp_path / "out" / "merged.md").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "merged.csv").open()))
    assert [(r["folder"], r["model"], r["policy"], r["score"]) for r in rows] == [
        (a, "tiny", "full", "90.0"),
        (a, "tiny", "snapkv", "50.0"),
        (b, "tiny", "full", "90.0"),
        (b, "tiny", "my_adakv", "60.0"),
    ]
    latex = (tmp_path / "out" / "merged.tex").read_text()
    assert r"my\_adakv & 4 & -- & 60.0 $\pm$ 1.0 $\cdot$ 1 kB \\" in latex
    assert latex.count(r"\toprule") == latex.count(r"\end{table}") == 1


def test_what_is_not_the_same_has_names_of_its_own(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    a = write("a", [FULL, row("snapkv", 50.0)])
    b = write("b", [row("full", 80.0, keep=1.0), row("snapkv", 40.0)], torch="2.14")
    c = write("c", [FULL, row("snapkv", 10.0, task="cwe", n=2)], model="large")
    d = write(
        "d",
        [
            row("full", 0.0, kl=0.0, task="text", perplexity=2.0),
            row("snapkv", 1.0, kl=0.25, task="text", perplexity=3.0),
        ],
    )
    assert main(["merge", a, b, c, d]) == 0
    table = capsys.readouterr().out
    for line in (
        f"| snapkv, tiny, {a} (vt) | 4 | – | 50.0 ± 1.0",
        f"| snapkv, tiny, {b} (vt) | 4 | – | 40.0 ± 1.0",
        f"| full, tiny, {b} (vt) | 4 | 80.0 ± 1.0",
        "| snapkv, large (cwe) | 2 | – | 10.0 ± 1.0",
        f"| snapkv, tiny, {d} | 4 | 0.2500 ·",
        f"Different torch: 2.13 ({a}), 2.14 ({b}), 2.13 ({c}), 2.13 ({d}).",
    ):
        assert line in table


def test_notes_and_different_conditions_go_with_every_table(
    write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write("a", [FULL, row("x^2", 50.0)], notes=["learned: trained for other weights"])
    b = write("b", [FULL, row("knorm", 60.0)], torch="2.14")
    assert main(["merge", a, b, f"out={tmp_path / 'm.tex'},{tmp_path / 'm.md'}"]) == 0
    printed = capsys.readouterr().err
    latex = (tmp_path / "m.tex").read_text()
    for text in (printed, latex, (tmp_path / "m.md").read_text()):
        assert f"learned: trained for other weights ({a})" in text
        assert f"Different torch: 2.13 ({a}), 2.14 ({b})." in text
    assert r"x\^{}2 & 4" in latex


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 3},
        {"model": None},
        {"environment": 5},
        {"rows": [5]},
        {"rows": {"a": 1}},
        {"rows": [{"policy": "knorm"}]},
    ],
)
def test_broken_results_are_one_line(write: Any, capsys: pytest.CaptureFixture[str], changes: Any) -> None:
    assert main(["merge", write("a", **{"rows": [FULL], **changes})]) == 2
    assert "expected results.json of learnkv eval (schema 1 or 2) with rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "folders=: expected folders of evaluations, got none"),
        (["missing"], "folders=missing: expected the folder of an evaluation, it has no results.json"),
        (["{old}"], "expected results.json of learnkv eval (schema 1 or 2) with rows"),
        (["{old}", "out=x.docx"], "out=x.docx: expected a file ending in .md, .csv, .tex"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: Any, line: Any) -> None:
    (tmp_path / "results.json").write_text('{"schema": 0, "rows": []}')
    assert main(["merge", *(word.format(old=tmp_path) for word in words)]) == 2
    assert line in capsys.readouterr().err


def test_the_cells_of_every_kind_are_explained(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    forced = [row(name, 40.0, metric="forced", kl=0.5) for name in ("full", "snapkv")]
    text = [row(name, 0.0, task="text", kl=0.25, perplexity=2.0) for name in ("full", "snapkv")]
    assert main(["merge", write("a", [FULL, *forced, *text])]) == 0
    explained = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Cells")]
    assert [line.removeprefix("Cells, means over tasks: ") for line in explained] == [
        "score ± standard error · bytes held per prompt.",
        "% of answers ranked first ± standard error · KL of the answer · bytes held per prompt.",
        "KL · bytes held per prompt.",
    ]
