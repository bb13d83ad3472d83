"""SIGTERM saves and ends a run, and the same command goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import train
from support.training import assert_same, signalled, weights

from learnkv.training.module import Distillation


@pytest.fixture
def run(words: list[str]) -> list[str]:
    """What is typed: five steps of two batches each, validation after the second and the fourth step and the last."""
    words = [word for word in words if not word.startswith("trainer.max_steps")]
    return [*words, "trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "validate_every=2"]


CUTS = {
    "in the midst of a step": ("training_step", 5, 3),
    "in a validation": ("validation_step", 3, 4),
    "before a validation": ("training_step", 4, 2),
}
"""Method, its call that gets the signal, and the step that the run ends after."""


def test_a_run_that_is_asked_to_end_goes_on_later(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([*run, f"output={tmp_path / 'whole'}"]) == 0
    for name, (where, calls, step) in CUTS.items():
        cut, handler = [*run, f"output={tmp_path / name}"], signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patch:
            patch.setattr(Distillation, where, signalled(getattr(Distillation, where), calls))
            capsys.readouterr()
            assert train(cut) == 143
        assert capsys.readouterr().err.strip().splitlines()[-1] == (
            f"error: ended by SIGTERM after step {step}; the same command resumes it"
        )
        assert signal.getsignal(signal.SIGTERM) == handler
        assert torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["global_step"] == step
        assert train(cut) == 0
        for file in ("metrics.csv", "policy/budgets.csv", "policy/policy.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_run_that_has_made_its_last_step_finishes(
    run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Distillation, "training_step", signalled(Distillation.training_step, 10))
    assert train([*run, "save_every=1", f"output={tmp_path / 'run'}"]) == 0
    assert (tmp_path / "run/policy/manifest.json").is_file()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both(run: list[str], tmp_path: Path) -> None:
    run = [word for word in run if not word.startswith(("trainer.max_steps", "trainer.accumulate", "validate_every"))]
    run += ["trainer.max_steps=12"]
    assert train([*run, f"output={tmp_path / 'whole'}", "trainer.accumulate_grad_batches=2"]) == 0
    command = [sys.executable, "-m", "learnkv", "train", *run, f"output={tmp_path / 'cut'}", "save_every=1"]
    command += ["trainer.devices=2", "trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        file, waited = tmp_path / "cut/checkpoints/last.ckpt", time.monotonic()
        while not file.is_file() and process.poll() is None and time.monotonic() - waited < 300:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=300)[1]
    assert process.returncode == 143, told
    assert told.count("ended by SIGTERM after step") == 1
    assert 1 <= torch.load(file, weights_only=True)["global_step"] < 12
    assert train([*run, "save_every=1", f"output={tmp_path / 'cut'}", "trainer.accumulate_grad_batches=2"]) == 0
    assert_same(weights(tmp_path / "cut/policy"), weights(tmp_path / "whole/policy"), rtol=1e-3, atol=1e-4)
