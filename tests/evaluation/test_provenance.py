"""Where results come from, the leaderboard's rows, and an evaluation in Weights & Biases."""

import csv
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.commands import eval

import learnkv
from learnkv.evaluation import provenance
from learnkv.evaluation.leaderboard import dataset_of, leaderboard
from learnkv.evaluation.results import rows_of


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True, capture_output=True)

    package = tmp_path / "src" / "learnkv"
    package.mkdir(parents=True)
    (package / "a.py").write_text("1")
    monkeypatch.setattr(learnkv, "__path__", [str(package)])
    assert provenance.commit() == "unknown"
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    assert re.fullmatch("[0-9a-f]{40}", provenance.commit())
    (package / "a.py").write_text("2")
    assert re.fullmatch("[0-9a-f]{40} with changes", provenance.commit())
    installed = tmp_path / "venv" / "learnkv"  # in a repository, but not of its files
    installed.mkdir(parents=True)
    monkeypatch.setattr(learnkv, "__path__", [str(installed)])
    assert provenance.commit() == "unknown"


def test_hashes_change_with_what_they_are_of() -> None:
    hashes = {provenance.template_hash(SimpleNamespace(chat_template=text)) for text in (None, "a", "b", {"a": "b"})}
    assert len(hashes) == 4
    assert "none" in hashes
    records = [{"prompt_hash": digest, "task_version": 2, "task_hash": "x", "n_original": 9} for digest in "ab"]
    about = provenance.tasks_of(records)
    assert about == {**provenance.tasks_of(records[::-1])}
    assert about["prompts_hash"] != provenance.tasks_of(records[:1])["prompts_hash"]
    assert provenance.tasks_of([{}]) == {
        "n_original": None,
        "task_version": None,
        "task_hash": None,
        "prompts_hash": None,
    }


def record(policy: str, task: str, index: int, score: float, **keys: Any) -> dict[str, Any]:
    about = {"policy": policy, "task": task, "index": index, "score": score, "metric": "generated", "length": 4096}
    sizes = {"asked": 0.25, "spent": 0.25, "bytes": 100.0, "bytes_full": 400.0, "tokens": 3, "haystack": None}
    row = {"setting": "query_agnostic", "keep": 0.25, "budget": None, "bytes_budget": None, "prompt_hash": str(index)}
    return {**about, **sizes, **row, **keys}


def test_rows_are_in_the_layout_of_kvpress() -> None:
    scores = {"niah_single_1": (100, 50), "vt": (80, 60), "longbench_qasper": (20, 40)}
    records = [
        record(policy, task, index, value - (policy == "snapkv") * 10, n_original=7, **keys)
        for policy, keys in (("full", {"keep": 1.0, "asked": 1.0, "spent": 1.0}), ("snapkv", {}))
        for task, values in scores.items()
        for index, value in enumerate(values)
    ]
    rows = leaderboard("m", {"commit": "abc", "chat_template": "t"}, rows_of(records))
    columns = ["dataset", "data_dir", "model", "method", "compression_ratio", "score"]
    assert list(rows[0])[:6] == columns
    assert [[row[column] for column in columns] for row in rows] == [
        ["ruler", "4096", "m", "full", 0, 72.5],
        ["longbench", "qasper", "m", "full", 0, 30],
        ["ruler", "4096", "m", "snapkv", 0.75, 62.5],
        ["longbench", "qasper", "m", "snapkv", 0.75, 20],
    ]
    ruler = rows[2]
    stderr = (25**2 + 10**2) ** 0.5 / 2  # of a task's mean: 25 and 10
    assert (ruler["ci_low"], ruler["ci_high"]) == pytest.approx((62.5 - 1.96 * stderr, 62.5 + 1.96 * stderr), abs=1e-3)
    assert (ruler["bytes"], ruler["bytes_full"], ruler["n"], ruler["n_original"]) == (100, 400, 4, 14)
    assert (ruler["score_full"], ruler["commit"], ruler["chat_template"]) == (72.5, "abc", "t")
    in_bytes = record("snapkv", "vt", 0, 10.0, keep=None, bytes_budget=0.1, asked_bytes=40, precision="K4V4", spent=0.4)
    (row,) = leaderboard("m", {}, rows_of([record("full", "vt", 0, 9.0, keep=1.0), in_bytes]))[1:]
    assert (row["compression_ratio"], row["bytes_budget"], row["precision"]) == (0.6, 0.1, "K4V4")
    assert (row["ci_low"], row["ci_high"]) == (None, None)


@pytest.mark.parametrize(
    ("task", "dataset"),
    [
        ("vt", ("ruler", "4096")),
        ("longbench_trec", ("longbench", "trec")),
        ("longbench_v2_hard", ("longbench_v2", "4096")),
        ("gsm8k", ("reasoning", "4096")),
        ("mine", ("mine", "4096")),
    ],
)
def test_data_sets_of_tasks(task: str, dataset: tuple[str, str]) -> None:
    assert dataset_of(task, 4096) == dataset


class Run:
    """A stand-in for a run of W&B."""

    id = "run1"

    def __init__(self) -> None:
        self.logged: dict[str, Any] = {}
        self.summary: dict[str, float] = {}
        self.artifacts: list[Any] = []

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def log(self, values: dict[str, Any]) -> None:
        self.logged.update(values)

    def log_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)


def test_results_say_where_they_come_from_and_wandb_has_them(
    model_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import wandb

    run, started = Run(), []
    words = [f"model={model_folder}", "--ckpt", "knorm", "tasks=text,vt", f"text={text_file}", "lengths=400"]
    words += ["samples=2", "keep=0.5", f"output={tmp_path / 'run'}"]
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(options) or run)
    assert eval(words) == 0
    assert not started  # nothing is logged unless it is asked for
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert re.match("[0-9a-f]{40}|unknown", result["environment"]["commit"])
    assert result["environment"]["chat_template"] == "none"
    by_task = {row["task"]: row for row in result["rows"] if row["policy"] == "knorm"}
    assert by_task["vt"]["n_original"] is None
    assert by_task["text"]["n_original"] > by_task["text"]["n"] == 2
    for row in result["rows"]:
        assert row["task_version"] == 1
        assert re.fullmatch("[0-9a-f]{16}", row["prompts_hash"])
        assert row["prompts_hash"] == by_task[row["task"]]["prompts_hash"]
    assert eval([*words, "wandb.mode=offline", "wandb.project=mine"]) == 0
    (options,) = started
    assert (options["mode"], options["project"], options["job_type"]) == ("offline", "mine", "eval")
    assert options["config"]["lengths"] == [400]
    table = run.logged["results"]
    assert len(table.data) == len(result["rows"])
    assert dict(zip(table.columns, table.data[0], strict=True))["policy"] == "full"
    board = list(csv.DictReader((tmp_path / "run" / "leaderboard.csv").open(newline="")))
    assert [row["method"] for row in board] == ["full", "knorm"]
    assert len(run.logged["leaderboard"].data) == 2
    assert run.summary["score/knorm/vt/400/query_agnostic/0.5"] == by_task["vt"]["score"]
    (artifact,) = run.artifacts
    assert artifact.type == "evaluation"
    assert {"results.json", "samples.jsonl", "leaderboard.csv"} <= artifact.manifest.entries.keys()

    def fails(**_: Any) -> None:
        raise OSError("no server")

    monkeypatch.setattr(wandb, "init", fails)
    capsys.readouterr()
    assert eval([*words, "wandb.mode=online"]) == 0
    assert f"warning: W&B failed (no server); the results are in {tmp_path / 'run'}" in capsys.readouterr().err


def test_an_offline_run_is_written_below_the_output(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    words = [f"model={model_folder}", "--ckpt", "knorm", "tasks=text", f"text={text_file}", "lengths=64", "samples=1"]
    assert eval([*words, "keep=0.5", f"output={tmp_path / 'run'}", "wandb.mode=offline"]) == 0
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
