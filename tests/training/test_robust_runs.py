"""What happens around a training never costs its policy: loggers, signals of SLURM, a second program, moved folders."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger
from support.commands import eval, train
from support.training import assert_same, signalled, weights

from learnkv.formats.folder_lock import folder_lock
from learnkv.training import run as training_run
from learnkv.training import trainer
from learnkv.training.callbacks import pictures
from learnkv.training.callbacks.fence import FencedLogger
from learnkv.training.module import Distillation


def rows_of(run: Path, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run / name).open() as table:
        return list(csv.DictReader(table))


class Failing(Logger):
    """A logger that fails at a method; `experiment` is W&B's run."""

    name, version = "failing", ""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "__init__":
            raise PermissionError("no home")

    def __getattribute__(self, name: str) -> Any:
        if name not in ("where", "__class__") and name == object.__getattribute__(self, "__dict__").get("where"):
            raise PermissionError("no home")
        return object.__getattribute__(self, name)

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize("where", ["__init__", "log_metrics", "save", "finalize"])
def test_a_failing_logger_costs_one_line(
    words: Any, where: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "_wandb_logger", lambda *_: Failing(where))
    words = [word for word in words if not word.startswith(("wandb", "trainer.max_steps"))]
    assert train([*words, "trainer.max_steps=2"]) == 0
    error = capsys.readouterr().err
    assert error.count("warning: W&B failed (no home); the training goes on without it") == 1
    assert (tmp_path / "run" / "policy" / "manifest.json").is_file()
    assert len(rows_of(tmp_path / "run")) == 2


def test_a_table_and_pictures_that_cannot_be_written_cost_a_line(
    words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "metrics.csv").mkdir(parents=True)
    monkeypatch.setattr(pictures, "by_keep", None)
    assert train([*words, "trainer.max_steps=2"]) == 0
    error = capsys.readouterr().err
    assert error.count("warning: metrics.csv failed") == 1
    assert error.count("warning: pictures failed") == 1
    assert weights(tmp_path / "run")


def test_a_logger_that_does_not_give_up_is_tried_again(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    class Second(Failing):
        def save(self) -> None:
            calls.append(1)
            if len(calls) == 1:
                raise OSError("full")

    for gives_up, count in ((True, 1), (False, 2)):
        calls.clear()
        logger = FencedLogger("table", lambda: Second(""), gives_up=gives_up)
        logger.save()
        logger.save()
        assert len(calls) == count
        assert capsys.readouterr().err.count("table failed (full)") == 1


def test_a_second_program_is_refused(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    with folder_lock(tmp_path / "run", "output"):
        assert train(words) == 2
    assert "another program is writing into this folder" in capsys.readouterr().err
    assert train([*words, "trainer.max_steps=1"]) == 0


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "1"), ("NODE_RANK", "1"), ("GROUP_RANK", "2")])
def test_only_the_first_process_locks(name: Any, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert training_run.is_first_process()
    monkeypatch.setenv(name, value)
    if name == "LOCAL_RANK":  # read when Lightning is imported
        monkeypatch.setattr(training_run.rank_zero_only, "rank", 1)
    assert not training_run.is_first_process()


def typed(words: list[str], **changed: object) -> list[str]:
    """The words with other values."""
    kept = [word for word in words if word.partition("=")[0] not in changed]
    return [*kept, *(f"{key}={value}" for key, value in changed.items())]


def test_a_moved_run_with_moved_text_and_model_is_resumed(
    words: Any,
    folder: Any,
    text_file: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cut = typed(words, **{"trainer.max_steps": 4})
    with monkeypatch.context() as patch:
        patch.setattr(Distillation, "training_step", signalled(Distillation.training_step, 2))
        assert train(cut) == 143
    (tmp_path / "run").rename(tmp_path / "moved")
    shutil.copy(text_file, tmp_path / "copy.txt")
    shutil.copytree(folder, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    moved = typed(cut, output="moved", text="copy.txt", model="model")
    assert train(moved) == 0
    capsys.readouterr()
    assert train(cut) == 0  # from the start, in the first folder
    assert_same(weights(tmp_path / "moved"), weights(tmp_path / "run"))
    for changed in (typed(moved, output=tmp_path / "moved"), typed(moved, output="../" + tmp_path.name + "/moved")):
        capsys.readouterr()
        assert train(changed) == 0
        assert "finished before" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["text", "model"])
def test_another_content_at_the_same_path_is_another_run(
    what: Any, words: Any, folder: Any, text_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(text_file, tmp_path / "copy.txt")
    shutil.copytree(folder, tmp_path / "model")
    mine = typed(words, text=tmp_path / "copy.txt", model=tmp_path / "model", **{"trainer.max_steps": 1})
    assert train(mine) == 0
    if what == "text":
        (tmp_path / "copy.txt").write_text((tmp_path / "copy.txt").read_text() + "one word more")
    else:
        weights_file = tmp_path / "model" / "model.safetensors"
        content = weights_file.read_bytes()
        weights_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert train(mine) == 2
    assert f"another {what}" in capsys.readouterr().err


def test_a_resumed_run_keeps_its_wandb_run(words: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    monkeypatch.setattr(trainer, "WandbLogger", lambda **options: ids.append((options["id"], options["resume"])))
    words = typed(words, **{"trainer.max_steps": 1, "wandb.mode": "offline"})
    words.remove("wandb=null")
    for more in ([], ["trainer.max_steps=2"], ["overwrite=true"]):
        assert train([*words, *more]) == 0
    (first, resume), second, third = ids
    assert second == (first, resume) == (first, "allow")
    assert third[0] != first


def test_wandb_is_handed_no_setting_that_it_warns_of(words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    handed = []

    def begin(**settings: Any) -> None:
        handed.append(settings)
        raise OSError("no W&B here")

    monkeypatch.setattr("wandb.init", begin)
    words = typed(words, **{"trainer.max_steps": 1, "wandb.mode": "offline"})
    words.remove("wandb=null")
    assert train(words) == 0
    assert handed
    assert "anonymous" not in handed[0]


def test_the_loss_has_one_name_and_rates_norms_and_times_are_logged(
    words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train([*words, "lora.rank=2"]) == 0
    rows, times = rows_of(run), rows_of(run, "times.csv")
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("step 4/4"))
    assert float(re.search(r"train/kl (\S+)  train/spent_over_asked ", line)[1]) == pytest.approx(
        float(rows[-1]["train/kl"]), abs=1e-4
    )
    assert "s/step" in line
    assert "| train/kl |" in (run / "policy" / "README.md").read_text()
    metrics = json.loads((run / "policy" / "manifest.json").read_text())["metrics"]
    assert metrics["train/kl"] == pytest.approx(float(rows[-1]["train/kl"]), rel=1e-4)
    assert not any(name.startswith("time/") for name in metrics)
    for name in ("train/grad_norm", "train/lr", "train/budget_lr", "train/lora_lr"):
        assert all(float(row[name]) > 0 for row in rows), name
    assert float(rows[0]["train/lr"]) / float(rows[0]["train/budget_lr"]) == pytest.approx(5e-3 / 0.1)
    assert [row["step"] for row in times] == [row["step"] for row in rows]
    assert all(float(row["time/step_seconds"]) > 0 for row in times)
    assert all(float(row["time/prompt_tokens_per_second"]) > 0 for row in times)


def test_the_last_step_is_logged_whatever_the_interval(words: Any, tmp_path: Path) -> None:
    """Console and card show it, so that the table has it, too; with every step logged it is the same."""
    seldom = [word for word in words if not word.startswith("trainer.log_every_n_steps")]
    for name, every in (("every", 1), ("seldom", 50)):
        assert train([*seldom, f"output={tmp_path / name}", f"trainer.log_every_n_steps={every}"]) == 0
    assert [row["step"] for row in rows_of(tmp_path / "seldom", "times.csv")] == ["3"]
    row, last = rows_of(tmp_path / "seldom")[-1], rows_of(tmp_path / "every")[-1]
    assert row == last
    assert {"train/kl", "train/lr", "train/grad_norm", "train/spent_over_asked"} <= {key for key in row if row[key]}
    metrics = json.loads((tmp_path / "seldom" / "policy" / "manifest.json").read_text())["metrics"]
    assert metrics["train/kl"] == pytest.approx(float(row["train/kl"]), rel=1e-4)


@pytest.mark.parametrize(("save_every", "line"), [(1, "resumes it from step 1"), (9, "begins anew, as no checkpoint")])
def test_an_interrupted_run_names_what_the_same_command_does(
    words: Any, save_every: Any, line: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Distillation.training_step

    def interrupted(self: Any, batch: Any, batch_idx: Any) -> Any:
        if self.global_step == 1:
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    monkeypatch.setattr(Distillation, "training_step", interrupted)
    assert train([*words, f"save_every={save_every}"]) == 130
    assert f"interrupted after step 1; the same command {line}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed_word", "line"),
    [
        ("trainer.fast_dev_run=true", "trainer.fast_dev_run=True: expected False"),
        ("trainer.fast_dev_run=3", "trainer.fast_dev_run=3: expected False"),
        ("trainer.barebones=true", "trainer.barebones=True: expected False"),
        ("trainer.overfit_batches=2", "trainer.overfit_batches=2: expected 0.0"),
        ("trainer.limit_train_batches=2", "trainer.limit_train_batches=2: expected None"),
        ("trainer.limit_val_batches=0", "trainer.limit_val_batches=0: expected None"),
        ("trainer.accelerator=tpu", "trainer: "),
        ("trainer.gradient_clip_algorithm=no", "trainer: "),
    ],
)
def test_arguments_of_the_trainer_that_do_not_fit_are_one_line(
    words: Any, typed_word: Any, line: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for word in words if word.partition("=")[0] != typed_word.partition("=")[0]]
    assert train([*words, typed_word]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {line}")


def test_a_run_that_ends_by_time_can_be_resumed(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = typed(words, **{"trainer.max_steps": 400})
    assert train([*words, "trainer.max_time=00:00:00:01", "save_every=1000"]) == 0
    assert re.search(r"ended after step \d+ of 400; the same command resumes it", capsys.readouterr().err)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] > 0


def test_a_broken_checkpoint_is_not_resumed(words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train([*words, "trainer.max_steps=1"]) == 0
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))
    assert train([*words, "trainer.max_steps=2"]) == 2
    assert "cannot be continued" in (error := capsys.readouterr().err)
    assert "its bytes have changed" in error


def test_the_folder_of_an_evaluation_is_refused(
    words: Any, folder: Any, text_file: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = f"output={tmp_path / 'run'}"
    one = ["tasks=text", f"text={text_file}", "lengths=60", "samples=1", "keep=0.5", f"model={folder}", where]
    assert eval(["ckpt=knorm", *one]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert train(words) == 2
    assert "has the config.yaml of an evaluation" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text() == config
