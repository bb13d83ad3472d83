"""`eval.py` as it is typed: what it writes, how it goes on, and its one line for bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import eval

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.evaluation import runner

ROW = {"policy", "task", "length", "setting", "keep", "spent", "bytes", "bytes_full", "n", "score", "score_full", "kl"}


@pytest.fixture
def words(model_folder: Path, text_file: Path, tmp_path: Path) -> list[str]:
    common = [f"model={model_folder}", f"text={text_file}", f"output={tmp_path / 'run'}", "lengths=64", "samples=3"]
    return [*common, "tasks=text", "keep=0.5,0.2"]


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "run" / "results.json").read_text())


def values(tmp_path: Path) -> dict[tuple[str, float], float]:
    return {(row["policy"], row["keep"]): row["kl"] for row in results(tmp_path)["rows"]}


def test_policies_of_every_kind_in_one_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("scorer: {class_path: learnkv.scorers.Knorm}\nsinks: 2\n")
    assert eval([*words, "--ckpt", "snapkv", "--ckpt", "full", str(mine)]) == 0
    found = results(tmp_path)
    assert found["schema"] == 1
    assert set(found["environment"]) >= {"python", "torch", "transformers", "dtype", "device"}
    rows = found["rows"]
    assert {row["policy"] for row in rows} == {"full", "snapkv", "mine"}
    assert len(rows) == 1 + 2 * 2
    assert all(ROW | {"stderr", "haystack"} <= set(row) for row in rows)
    assert all(row["kl"] > 1e-4 for row in rows if row["policy"] != "full")
    assert {row["n"] for row in rows} == {3}
    folder = tmp_path / "run"
    assert sorted(file.name for file in folder.iterdir()) == [
        "config.yaml",
        "pareto.png",
        "results.json",
        "results.md",
        "samples.jsonl",
    ]
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (resolved["samples"], resolved["keep"], resolved["seed"]) == (3, [0.5, 0.2], 42)
    assert "results.md" in capsys.readouterr().out


def test_baselines_are_compared_after_the_policies_of_ckpt(words: list[str], tmp_path: Path) -> None:
    assert eval([*words, "--ckpt", "knorm", "baselines=extra_passes,knorm,random,-kvzip", "samples=1"]) == 0
    assert list(dict.fromkeys(row["policy"] for row in results(tmp_path)["rows"])) == ["full", "knorm", "random"]


def test_the_resolved_config_alone_repeats_the_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert eval([*words, "--ckpt", "snapkv"]) == 0
    first = values(tmp_path)
    monkeypatch.setattr(runner, "prefill", lambda *a, **k: pytest.fail("finished samples were read again"))
    (tmp_path / "run" / "results.json").unlink()
    assert eval([f"config={tmp_path / 'run' / 'config.yaml'}"]) == 0
    assert values(tmp_path) == first


def test_an_interrupted_run_leaves_a_report_and_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = runner.prefill, []

    def stops(*given: Any, **options: Any) -> CompressedCache:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "prefill", stops)
        assert eval([*words, "--ckpt", "snapkv", "batch_size=1"]) == 130
    assert {row["n"] for row in results(tmp_path)["rows"]} == {2}
    assert eval([*words, "--ckpt", "snapkv", "batch_size=1"]) == 0
    resumed = values(tmp_path)
    assert {row["n"] for row in results(tmp_path)["rows"]} == {3}
    assert eval([*words, "--ckpt", "snapkv", "batch_size=1", f"output={tmp_path / 'other'}"]) == 0
    whole = json.loads((tmp_path / "other" / "results.json").read_text())["rows"]
    assert {(row["policy"], row["keep"]): row["kl"] for row in whole} == resumed


def test_a_full_disk_is_one_line_and_loses_nothing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval([*words, "--ckpt", "snapkv", "samples=1"]) == 0
    before = (tmp_path / "run" / "samples.jsonl").read_text()

    def full(self: Any, records: list[dict[str, Any]]) -> None:
        raise OSError(28, "No space left on device", str(self.path))

    monkeypatch.setattr(runner.Store, "add", full)
    assert eval([*words, "--ckpt", "snapkv"]) == 1
    assert "no space left on disk" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "run" / "samples.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("keep=1.5", "keep=1.5: expected a fraction of the prompt's entries, above 0 and at most 1"),
        ("keep=0", "keep=0: expected a fraction of the prompt's entries, above 0 and at most 1"),
        ("keep=0.01", "keep=0.01: leaves 0.47 entries per head of a prompt of 47 tokens"),
        ("budget=0", "budget=0: expected at least 1"),
        ("samples=many", "samples=many: expected int, got many"),
        ("keeps=0.5", "keeps=0.5: unknown key; did you mean keep?"),
        ("setting=aware", "setting=aware: expected one of"),
        ("ckpt=snapvk", "ckpt=snapvk: expected a checkpoint, an exported folder, reference"),
        ("ckpt=missing/last.ckpt", "missing/last.ckpt"),
        ("baselines=all,-snapvk", "baselines=-snapvk: expected all, a kind (trained, calibrated, extra_passes, online"),
        ("baselines=snapvk", "a method of configs/policies; did you mean snapkv?"),
        ("model=missing/folder/here", "model=missing/folder/here: expected `reference`"),
        ("dtype=fp8", "dtype=fp8: expected auto, float32"),
        ("lengths=4096", "lengths=4096: expected at most 512"),
        ("config=missing", "config=missing: expected a YAML file or one of"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture[str], word: str, line: str
) -> None:
    assert eval([*words, "--ckpt", "snapkv", word]) == 2
    said = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(said) == 1
    assert line in said[0]


def test_no_arguments_are_told_what_is_expected(capsys: pytest.CaptureFixture[str]) -> None:
    assert eval([]) == 2
    assert (
        "expected config=NAME|PATH or key=value; names: method_comparison, quickstart, ruler, text"
        in capsys.readouterr().err
    )


def test_two_policies_of_one_name_are_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.yaml").write_text("scorer: {class_path: learnkv.scorers.Knorm}\n")
    assert eval([*words, "--ckpt", str(tmp_path / "a/mine.yaml"), str(tmp_path / "b/mine.yaml")]) == 2
    assert "a second policy that is called mine" in capsys.readouterr().err
