"""Under SLURM: the requeue signal saves our checkpoint, and a checkpoint of Lightning's is not resumed."""

import csv
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from support.commands import train
from support.training import assert_same, weights

from learnkv.training import run as training_run
from learnkv.training import slurm
from learnkv.training.module import Distillation


def rows_of(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / name).open() as table:
        return list(csv.DictReader(table))


SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_JOB_NAME": "train",
    "SLURM_NTASKS": "1",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "localhost",
}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A SLURM job whose scontrol writes down its words."""
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{scontrol.parent}:{os.environ['PATH']}")
    return tmp_path / "requeued"


def usr1(method: Any, call: int) -> Any:
    """The method, whose process gets SIGUSR1 at this call."""
    calls = []

    def signalling(self: Any, batch: Any, batch_idx: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGUSR1)
        return method(self, batch, batch_idx)

    return signalling


def test_the_requeue_signal_saves_our_checkpoint_and_requeues(
    words: Any, job: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train([*words, f"output={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "training_step", usr1(Distillation.training_step, 2))
        assert train(words) == 143
    assert "ended by SIGUSR1 after step 2; job 77 is requeued and resumes it" in capsys.readouterr().err
    assert job.read_text() == "requeue 77\n"
    assert not list(run.rglob("hpc_ckpt*"))
    assert train(words) == 0
    assert_same(weights(run), weights(tmp_path / "whole"))
    assert (run / "metrics.csv").read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


def test_a_requeue_checkpoint_of_lightnings_is_not_resumed(words: Any, job: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train([*words, "seed=3"]) == 0
    for folder in (run, run / "checkpoints"):
        shutil.copy(run / "checkpoints" / "last.ckpt", folder / "hpc_ckpt_1.ckpt")
    assert train([*words, "overwrite=true"]) == 0
    assert [row["step"] for row in rows_of(run)] == ["0", "1", "2", "3"]
    assert train([*words, f"output={tmp_path / 'new'}"]) == 0
    assert_same(weights(run), weights(tmp_path / "new"))


def test_a_job_of_an_array_and_one_that_cannot_be_requeued(job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")
    assert slurm.requeue() == "job 70_4 is requeued and resumes it"
    assert job.read_text() == "requeue 70_4\n"
    monkeypatch.setenv("PATH", "/nowhere")
    assert "could not requeue it" in slurm.requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "70; rm")
    assert slurm.requeue() == "the same command resumes it"


def test_the_signal_before_training_ends_the_run(
    words: Any, job: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(training_run, "_load_model", lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    assert train(words) == 143
    assert "ended by SIGUSR1 outside of training; job 77 is requeued" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before
