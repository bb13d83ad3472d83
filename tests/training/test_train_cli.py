"""`train.py` as a user has it: what a run leaves behind, that it resumes, what it says when something is wrong."""

import csv
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning import Trainer
from support.commands import eval, export, train
from support.training import assert_same, in_two_processes, stored_tensors, weights
from torch import Tensor

from learnkv.persistence.policies import fill_sizes, load_policy
from learnkv.training.callbacks.checkpoints import Checkpoints
from learnkv.training.data.batches import Batch
from learnkv.training.module import Distillation

ALL = """
objective:
  class_path: learnkv.training.objectives.WeightedSum
  init_args:
    objectives:
    - {class_path: learnkv.training.objectives.ReverseKL, init_args: {temperature: 2.0}}
    - {class_path: learnkv.training.objectives.HiddenMSE, init_args: {layers: all}}
    - class_path: learnkv.training.objectives.ScoreRegression
      init_args: {target: &kvzip {class_path: learnkv.scorers.KVzip}}
    - class_path: learnkv.training.objectives.BudgetRegression
      init_args: {target: *kvzip}
    weights: [1, 0.5, 0.1, 0.1]
weights: context
keep_sampling: sandwich
students: 3
temperature: [0.5, 0.2]
soft_steps: 1
gumbel_noise: 1.0
lora: {rank: 2, targets: [q_proj, o_proj, down_proj], lr: 0.01}
"""


def everything(folder: Path, objective: str) -> list[str]:
    """What is typed for all objectives and draws at once; nothing for `kl`."""
    if objective == "kl":
        return []
    (folder / "all.yaml").write_text(ALL)
    return [f"config={folder / 'all.yaml'}", "mixture.answers=1"]


def test_a_run_leaves_a_checkpoint_a_policy_a_table_and_its_settings(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train(words) == 0
    assert "step 4/4" in capsys.readouterr().err
    file = run / "checkpoints" / "last.ckpt"
    assert file.stat().st_size < 60_000
    assert not list(file.parent.glob("*.part"))
    checkpoint = torch.load(file, weights_only=True)
    assert checkpoint["global_step"] == 4
    assert all(name.startswith("policy.") for name in checkpoint["state_dict"])
    assert any(held.abs().max() > 0 for name, held in checkpoint["state_dict"].items() if name.endswith("logits"))
    assert_same(weights(file), weights(run / "policy"))

    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["lengths"] == [60, 90]
    assert settings["trainer"]["max_steps"] == 4
    manifest = json.loads((run / "policy" / "manifest.json").read_text())
    assert manifest["training"] == settings
    assert manifest["model"]["shapes"] == {"layers": 2, "heads": 2, "head_dim": 8, "hidden_size": 32, "groups": 2}
    with (run / "metrics.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [int(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert all(float(row["train/spent_over_asked"]) == pytest.approx(1, abs=0.02) for row in rows)
    assert float(rows[-1]["val/learned_kl@0.1"]) > 0
    with (run / "policy" / "budgets.csv").open() as table:
        budgets = list(csv.DictReader(table))
    assert [float(sum(float(row[f"keep_{k:g}"]) for row in budgets)) / 4 for k in (0.05, 0.4)] == pytest.approx(
        [0.05, 0.4], abs=0.01
    )

    before = (run / "policy" / "manifest.json").read_text()
    assert train(words) == 0  # finished: nothing is done again
    assert "finished before" in capsys.readouterr().err
    assert (run / "policy" / "manifest.json").read_text() == before
    assert train([*words, "lr=0.1"]) == 2
    assert "another lr" in capsys.readouterr().err
    stored = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(stored.replace("soft_steps: 0\n", ""))  # of before there was this key
    assert train([*words, "soft_steps=1"]) == 2
    assert "another soft_steps" in capsys.readouterr().err
    assert train(words) == 0
    assert "finished before" in capsys.readouterr().err
    (run / "config.yaml").unlink()
    assert train(words) == 2
    assert "without its config.yaml" in capsys.readouterr().err
    (run / "config.yaml").write_text(stored)

    out = tmp_path / "out"
    assert export([f"ckpt={file}", f"out={out}"]) == 0
    assert_same(weights(out), weights(run / "policy"))
    assert (out / "budgets.csv").read_text() == (run / "policy" / "budgets.csv").read_text()

    file.write_bytes(file.read_bytes()[:-2000])
    assert train(words) == 2
    assert "cannot be continued" in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["kl", "all"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    words: list[str],
    objective: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [*words, *everything(tmp_path, objective), "trainer.accumulate_grad_batches=2", "save_every=1"]
    whole, cut = (f"output={tmp_path / name}" for name in ("whole", "cut"))
    assert train([*words, whole]) == 0
    step, seen = Distillation.training_step, []

    def until_it_breaks(self: Any, batch: Batch, batch_idx: int) -> Tensor:
        seen.append(batch.number)
        if len(seen) == 6:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", until_it_breaks)
    assert train([*words, cut]) == 130
    assert torch.load(tmp_path / "cut/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    assert train([*words, cut]) == 0
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert_same(weights(tmp_path / "cut/policy"), weights(tmp_path / "whole/policy"))
    tables = [(tmp_path / name / "metrics.csv").read_text() for name in ("whole", "cut")]
    assert tables[0] == tables[1]


def test_an_adapter_goes_from_the_run_to_whoever_uses_its_policy(
    words: list[str], folder: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert train([*words, "lora.rank=2", "lora.lr=0.02", "trainer.max_steps=3"]) == 0
    file = run / "checkpoints" / "last.ckpt"
    names = torch.load(file, weights_only=True)["state_dict"].keys()
    assert {name.split(".")[0] for name in names} == {"policy", "model"}
    assert sum(name.startswith("model.") for name in names) == 2 * 2 * 2  # layers, targets, matrices
    assert all("lora_" in name for name in names if name.startswith("model."))
    of_run, of_checkpoint = load_policy(run), load_policy(file)
    assert_same(dict(of_run.adapter.state), dict(of_checkpoint.adapter.state))
    assert all(held.abs().max() > 0 for held in of_run.adapter.state.values())
    assert export([f"ckpt={file}", f"out={tmp_path / 'out'}"]) == 0
    assert_same(dict(load_policy(tmp_path / "out").adapter.state), dict(of_run.adapter.state))

    typed = [f"model={folder}", "tasks=text", f"text={words[2].removeprefix('text=')}", "lengths=60", "samples=4"]
    typed += ["keep=0.3", f"output={tmp_path / 'eval'}"]
    assert eval([f"ckpt={run}", *typed]) == 0
    with_adapter = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
    manifest = run / "policy" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"adapter": true', '"adapter": false'))
    assert eval([f"ckpt={run}", *typed]) == 0
    without = json.loads((tmp_path / "eval" / "results.json").read_text())["rows"]
    assert [row["policy"] for row in without] == [row["policy"] for row in with_adapter]
    assert without[0]["score"] == with_adapter[0]["score"]  # the full cache
    assert without[1]["kl"] != with_adapter[1]["kl"]


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "strategies"), [("kl", ["ddp"]), ("all", ["ddp", "fsdp"])])
def test_two_processes_equal_one_with_accumulation(
    words: list[str], objective: str, strategies: list[str], tmp_path: Path
) -> None:
    """A step at keep=1 reaches no parameter; with all objectives, processes read prompts and answer unequally often."""
    words = [*words, *everything(tmp_path, objective), "trainer.max_steps=3", "keep=0.3,0.1,1"]
    words += ["students=1"] if objective == "kl" else ["chunk_size=25", "checkpointing=true"]
    assert train([*words, f"output={tmp_path / 'one'}", "trainer.accumulate_grad_batches=2"]) == 0
    file = "checkpoints/last.ckpt"
    one = torch.load(tmp_path / "one" / file, weights_only=True)
    for strategy in strategies:
        in_two_processes([*words, f"output={tmp_path / strategy}", f"trainer.strategy={strategy}"], tmp_path)
        assert_same(weights(tmp_path / strategy / "policy"), weights(tmp_path / "one/policy"), rtol=1e-4, atol=1e-5)
        held = torch.load(tmp_path / strategy / file, weights_only=True)
        assert_same(held["state_dict"], one["state_dict"], rtol=1e-4, atol=1e-5)
        assert stored_tensors(tmp_path / strategy / file) == stored_tensors(tmp_path / "one" / file)
    assert weights(tmp_path / "one/policy")["allocator.layer_budget.logits"].abs().max() > 0.05
    further = [*words, f"output={tmp_path / strategies[-1]}", "trainer.accumulate_grad_batches=2"]
    further = [*(word for word in further if not word.startswith("trainer.max_steps")), "trainer.max_steps=4"]
    assert train(further) == 0  # what two processes began, one goes on with
    assert torch.load(tmp_path / strategies[-1] / file, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("lenghts=5,6", "did you mean lengths"),
        ("batch_size=two", "batch_size=two"),
        ("keep=0", "keep=0"),
        ("keep=0.01", "keep=0.01: leaves less than one entry"),
        ("keep=0.1,1.5", "keep=1.5"),
        ("lengths=300,400", "context of 256"),
        ("lengths=90,60", "lengths=90,60"),
        ("chunk_size=0", "chunk_size=0"),
        ("keep_range=0.5,2", "keep_range=2: expected fractions of the prompt's entries, above 0 and at most 1"),
        ("soft_steps=-1", "soft_steps=-1: expected 0 or more"),
        ("validation_batches=0", "validation_batches=0: expected at least 1, as budgets depend"),
        ("text=/no/such/file.txt", "no such file"),
        ("model=/no/such/folder", "model=/no/such/folder"),
        ("trainer.max_steps=0", "trainer.max_steps=0"),
        ("trainer.strategy=deepspeed", "trainer.strategy=deepspeed: expected auto, ddp or fsdp"),
        ("trainer.precision=bf16-mixed", "trainer.precision=bf16-mixed: expected 32-true"),
        ("trainer.max_stepz=3", "did you mean trainer.max_steps"),
        ("policy.scorer.class_path=learnkv.scorers.Snap", "policy.scorer"),
        ("lengths=90,91,92", "lengths=90,91,92: expected 2 values"),
        ("gradient_tokens=0", "gradient_tokens=0: expected more than 0"),
        ("policy.init_args.sinks=-1", "sinks=-1"),
        ("policy=null", "policy"),
        ("mixture.text=-1", "mixture"),
        ("config=nothing", "config=nothing"),
        ("lora.rank=0", "rank=0"),
        ("lora.targets=no_such", "targets=no_such do not fit"),
        ("hold_out=nothing", "hold_out=nothing"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: list[str], typed: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    key = typed.split("=")[0]
    assert train([*(word for word in words if not word.startswith(f"{key}=")), typed]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if not line.startswith("Loading weights")] == [said[-1]]
    assert said[-1].startswith("error: ")
    assert told in said[-1]


def test_no_arguments_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train([]) == 2
    assert "quickstart" in capsys.readouterr().err


def test_nan_is_one_line_and_exit_code_1(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "learnkv.training.objectives.kl.forward_kl", lambda teacher, student, _: student[:, 0] * torch.nan
    )
    assert train(words) == 1
    assert "not finite" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_full_disk_leaves_the_previous_checkpoint(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Checkpoints._save

    def without_space(self: Any, trainer: Trainer) -> None:
        def half(path: Path) -> None:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")

        if trainer.global_step == 3:
            trainer.save_checkpoint = half
        save(self, trainer)

    monkeypatch.setattr(Checkpoints, "_save", without_space)
    assert train([*words, "save_every=1"]) == 1
    assert "no space left on disk" in capsys.readouterr().err.strip().splitlines()[-1]
    folder = tmp_path / "run" / "checkpoints"
    assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 2


def test_sizes_of_the_model_are_filled_in_where_they_are_missing() -> None:
    spec = {"scorer": {"init_args": {"num_layers": 0, "head_dim": 7, "hidden_size": 0, "base": None}}, "sinks": 0}
    filled = fill_sizes(spec, {"layers": 5, "heads": 2, "head_dim": 8, "hidden_size": 32})
    known = {"num_layers": 5, "head_dim": 7, "hidden_size": 32, "base": None}
    assert filled == {"scorer": {"init_args": known}, "sinks": 0}


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ([], "ckpt=: expected a path"),
        (["ckpt=a.ckpt"], "out=: expected a path"),
        (["ckpt=snapkv", "out=b"], "expected a checkpoint"),
        (["--ckpt", "/no/such.ckpt", "--out", "b"], "no such file"),
    ],
)
def test_export_says_what_it_needs(typed: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(typed) == 2
    assert told in capsys.readouterr().err
