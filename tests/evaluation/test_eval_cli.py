"""`eval.py` as it is typed: what it writes, how it goes on, and its one line for bad input."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.commands import eval

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.evaluation import measured_jobs, runner
from learnkv.evaluation.folder import check_folder, evaluation_folder

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
    assert found["schema"] == 2
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
        "leaderboard.csv",
        "pareto.png",
        "report.html",
        "results.json",
        "results.md",
        "samples.jsonl",
    ]
    page = (folder / "report.html").read_text()
    assert f"learnkv eval ckpt=snapkv,full,{mine}" in page
    assert '"title":"text, 64 tokens, prompt ' in page
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (resolved["samples"], resolved["keep"], resolved["seed"]) == (3, [0.5, 0.2], 42)
    assert "results.md" in capsys.readouterr().out


def test_baselines_are_compared_after_the_policies_of_ckpt(words: list[str], tmp_path: Path) -> None:
    assert eval([*words, "--ckpt", "knorm", "baselines=extra_passes,knorm,random,-kvzip,-kvgrad", "samples=1"]) == 0
    assert list(dict.fromkeys(row["policy"] for row in results(tmp_path)["rows"])) == ["full", "knorm", "random"]


def test_the_resolved_config_alone_repeats_the_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert eval([*words, "--ckpt", "snapkv"]) == 0
    first = values(tmp_path)
    monkeypatch.setattr(measured_jobs, "prefill", lambda *a, **k: pytest.fail("finished samples were read again"))
    (tmp_path / "run" / "results.json").unlink()
    assert eval([f"config={tmp_path / 'run' / 'config.yaml'}"]) == 0
    assert values(tmp_path) == first


def test_an_interrupted_run_leaves_a_report_and_goes_on(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = measured_jobs.prefill, []

    def stops(*given: Any, **options: Any) -> CompressedCache:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(measured_jobs, "prefill", stops)
        assert eval([*words, "--ckpt", "snapkv", "batch_size=1"]) == 130
    assert {row["n"] for row in results(tmp_path)["rows"]} == {2}
    assert f"6 samples are stored in {tmp_path / 'run'}: the same command continues" in capsys.readouterr().err
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
        ("keep=0.01", "snapkv: keep=0.01: leaves 0.47 entries per head of a prompt of 47 tokens"),
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
        "expected config=NAME|PATH or key=value; names: fidelity, method_comparison, quickstart, ruler, text"
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


def records(tmp_path: Path) -> Any:
    return [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]


def test_a_second_evaluation_adds_to_the_table(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert eval([*words, "--ckpt", "snapkv"]) == 0
    first = values(tmp_path)
    assert eval([*words, "--ckpt", "knorm", "keep=0.4", "samples=2"]) == 0
    both = values(tmp_path)
    assert both.keys() == {*first, ("knorm", 0.4)}
    assert {row["n"] for row in results(tmp_path)["rows"]} == {2}  # the prompts that all have
    table = capsys.readouterr().out
    assert "| policy | keep 0.5 | keep 0.4 | keep 0.2 |" in table
    assert "| knorm | – | **" in table
    assert eval([*words, "--ckpt", "snapkv"]) == 0
    assert {key: value for key, value in values(tmp_path).items() if key in first} == first
    assert "| knorm (2 of 3 samples) |" in capsys.readouterr().out


def test_other_prompts_and_other_models_are_not_in_one_table(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], model_folder: Any
) -> None:
    assert eval([*words, "--ckpt", "snapkv"]) == 0
    assert eval([*words, "--ckpt", "knorm", "lengths=72"]) == 0
    assert {policy for policy, _ in values(tmp_path)} == {"full", "snapkv", "knorm"}
    copy = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    capsys.readouterr()
    assert eval([*words, "--ckpt", "random", f"model={copy}"]) == 0
    assert {policy for policy, _ in values(tmp_path)} == {"full", "random"}
    line = "15 samples of another model, or other versions of code or libraries, are not in the table"
    assert line in capsys.readouterr().err


def test_a_moved_model_and_folder_continue(
    words: Any, tmp_path: Path, model_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert eval([*words, "--ckpt", "snapkv"]) == 0
    first = values(tmp_path)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    copy = shutil.copytree(model_folder, tmp_path / "model")
    monkeypatch.setattr(measured_jobs, "prefill", lambda *a, **k: pytest.fail("finished samples were read again"))
    assert eval([*words, "--ckpt", "snapkv", f"model={copy}", f"output={tmp_path / 'moved'}"]) == 0
    shutil.move(tmp_path / "moved", tmp_path / "run")
    assert values(tmp_path) == first


def test_samples_have_prompt_answer_and_costs_and_are_shown(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert eval([*words, "--ckpt", "snapkv", "tasks=niah_single_1", "lengths=384", "samples=1", "--show", "1"]) == 0
    shown = capsys.readouterr().out
    for record in records(tmp_path):
        assert record["expected"]
        assert all(answer in shown for answer in record["expected"])
        assert record["prompt"]
        assert len(record["prompt"]) < 450
        assert record["prefill_seconds"] > 0
        assert record["decode_seconds"] > 0
        assert record["tokens"] > 0
        assert f"  {record['policy']} keep {record['keep']:g}: {record['score']:.0f} {record['answer']!r}" in shown
    assert "The full cache scores near 0 on niah_single_1 (0.0)" in shown
    for row in results(tmp_path)["rows"]:
        assert row["prefill_seconds"] > 0
        assert row["tokens_per_second"] > 0
        assert row["peak_bytes"] is None or row["peak_bytes"] > row["bytes"]
    assert "| snapkv | keep 0.5 | 0." in (tmp_path / "run" / "results.md").read_text().split("## Time and memory")[1]


@pytest.mark.parametrize("content", ["model: reference\nobjective: null\n", "[broken", "5", ""])
def test_the_folder_of_a_training_is_left_alone(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(content)
    assert eval([*words, "--ckpt", "snapkv"]) == 2
    assert f"expected another folder, such as output={tmp_path / 'run' / 'eval'}" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == content
    assert eval([*words, "--ckpt", "snapkv", "samples=1", f"output={tmp_path / 'run' / 'eval'}"]) == 0


def test_a_config_of_another_program_may_be_hostile(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[" * 3000)
    with pytest.raises(UserError, match="expected another folder"):
        check_folder(str(tmp_path))


def test_a_second_program_in_the_folder_is_one_line(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with evaluation_folder(str(tmp_path / "run")):
        assert eval([*words, "--ckpt", "snapkv"]) == 2
    assert "another program is writing into this folder" in capsys.readouterr().err.splitlines()[-1]
    assert eval([*words, "--ckpt", "snapkv", "samples=1"]) == 0


def test_a_folder_that_cannot_be_written_is_one_line(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert eval([*words, "--ckpt", "snapkv", f"output={tmp_path / 'file' / 'run'}"]) == 2
    assert "expected a folder that can be written" in capsys.readouterr().err.splitlines()[-1]
