"""Batches shared out among processes: the records of one, resumed with another number, one error for all."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import eval
from support.evaluation import KEEPS, policies, text_prompts
from support.models import Loaded
from torch import distributed

from learnkv.errors import RunError, UserError
from learnkv.evaluation import processes, runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.processes import Processes
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.text import Text

COSTS = ("prefill_seconds", "decode_seconds", "peak_bytes")


def untimed(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in COSTS}


def samples(file: Path) -> list[dict[str, Any]]:
    """Of a finished run, without what they took, in one order."""
    records = [untimed(json.loads(line)) for line in file.read_text().splitlines()]
    assert len({one["fingerprint"] for one in records}) == len(records)
    return sorted(records, key=lambda one: one["fingerprint"])


def group_of(count: int) -> list[Processes]:
    """Processes of one machine, for threads."""
    store = distributed.HashStore()
    return [Processes(number, count, number, store) for number in range(count)]


def in_threads(count: int, work: Callable[[Processes], None]) -> None:
    """Call `work` as every process of a group; raises the error of the first."""
    errors: dict[int, Exception] = {}

    def call(group: Processes) -> None:
        try:
            work(group)
        except Exception as error:
            errors[group.number] = error

    threads = [threading.Thread(target=call, args=(group,)) for group in group_of(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[min(errors)]


def measure(loaded: Loaded, folder: Path, count: int, rows: int = 9) -> list[dict[str, Any]]:
    """Records of `count` processes into a folder, which may have samples already."""
    folder.mkdir(exist_ok=True)
    path = folder / "samples.jsonl"

    def work(group: Processes) -> None:
        families, jobs = [Text(text_prompts(rows))], jobs_of(loaded[0], policies("snapkv"), KEEPS)
        store = Store(path, group.shard)
        with torch.no_grad():
            runner.run(loaded[0], families, jobs, store, Packing(2), group)
        if group.is_first:
            store.merge()

    in_threads(count, work)
    return samples(path)


def test_three_processes_have_the_records_of_one(loaded: Loaded, tmp_path: Path) -> None:
    alone = measure(loaded, tmp_path / "alone", 1)
    shared = measure(loaded, tmp_path / "shared", 3)
    assert len(alone) == 9 * (1 + len(KEEPS))
    assert shared == alone
    assert [file.name for file in (tmp_path / "shared").iterdir()] == ["samples.jsonl"]


def test_another_number_of_processes_continues(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = measure(loaded, tmp_path / "alone", 1)
    plain, batches = runner.read, []

    def stops(*given: Any) -> Any:
        batches.append(given)
        if len(batches) == 4:
            raise RunError("enough")
        return plain(*given)

    with monkeypatch.context() as patched:
        patched.setattr(runner, "read", stops)
        with pytest.raises(RunError, match="enough"):
            measure(loaded, tmp_path / "shared", 1)
        before = (tmp_path / "shared" / "samples.jsonl").read_text().splitlines()
    shard = tmp_path / "shared" / "samples.2.jsonl"  # of an earlier run with more processes, and cut off
    shard.write_text(f"{before[0]}\n{before.pop()}\n{before[1][:50]}")
    (tmp_path / "shared" / "samples.jsonl").write_text("\n".join(before[2:]) + "\n")
    batches.clear()
    monkeypatch.setattr(runner, "read", lambda *given: batches.append(given) or plain(*given))
    resumed = measure(loaded, tmp_path / "shared", 2)
    assert [one["fingerprint"] for one in resumed] == [one["fingerprint"] for one in alone]
    for one, other in zip(resumed, alone, strict=True):
        assert one == {**other, "kl": pytest.approx(other["kl"], abs=1e-6), "loss": pytest.approx(other["loss"])}
    assert len(batches) < 5
    assert not shard.exists()


def test_shards_are_merged_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    Store(path).add([{"fingerprint": "a"}])
    first, second = Store(path, 0), Store(path, 1)
    first.add([{"fingerprint": "b"}])
    second.add([{"fingerprint": "b"}, {"fingerprint": "c"}])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["samples.0.jsonl", "samples.1.jsonl", "samples.jsonl"]
    first.merge()
    assert [one["fingerprint"] for one in samples(path)] == ["a", "b", "c"]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.jsonl"]


def test_an_error_of_another_process_is_raised_by_the_first() -> None:
    groups = group_of(2)
    groups[1].fail(UserError("keep=0.01: leaves less than an entry"))
    for wait in (groups[0].check, lambda: next(groups[0].shared(3)), lambda: groups[0].finish([])):
        with pytest.raises(UserError, match="leaves less than an entry"):
            wait()


def test_a_process_that_ended_early_is_named() -> None:
    class Ended:
        exitcode = -9

    group = Processes(0, 2, 0, None, [Ended()])
    with pytest.raises(RunError, match="process 1 of 2 ended early with exit code -9"):
        group.finish([])


@pytest.mark.parametrize(
    ("asked", "local", "gpus", "expected"),
    [
        ("auto", 1, 2, "cuda:1"),
        ("cuda", 0, 2, "cuda:0"),
        ("cpu", 5, 2, "cpu"),
        ("auto", 1, 0, "auto"),
        ("auto", 2, 2, "4 processes: expected a GPU for each, this machine has 2"),
        ("cuda:1", 0, 2, "device=cuda:1: expected auto, cuda or cpu for 4 processes"),
    ],
)
def test_every_process_has_a_gpu(
    asked: str, local: int, gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    group = Processes(local, 4, local)
    if "expected" in expected:
        with pytest.raises(UserError, match=expected):
            group.device(asked)
    else:
        assert group.device(asked) == expected
    assert Processes().device("cuda:1") == "cuda:1"


def test_torchrun_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with (
        pytest.raises(UserError, match="devices=2: expected the number of torchrun's processes, 3"),
        processes.processes(2, lambda *_: None, None),
    ):
        pass


@pytest.fixture
def words(model_folder: Path, text_file: Path) -> list[str]:
    common = ["--ckpt", "snapkv", f"model={model_folder}", "tasks=text,vt", f"text={text_file}", "device=cpu"]
    return [*common, "lengths=400", "samples=4", "batch_size=2", "keep=0.5,0.25", "dtype=float32"]


@pytest.mark.slow
def test_two_processes_of_a_command(words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "learnkv"]
    torchrun = subprocess.Popen(
        [*command, "eval", *words, f"output={tmp_path / 'torchrun'}"], stdout=subprocess.DEVNULL
    )
    assert eval([*words, f"output={tmp_path / 'alone'}"]) == 0
    shown = capfd.readouterr().out
    assert eval([*words, f"output={tmp_path / 'devices'}", "devices=2"]) == 0
    out, err = capfd.readouterr()
    assert out.replace("devices", "alone").splitlines()[0] == shown.splitlines()[0]
    assert "Traceback" not in err
    assert torchrun.wait() == 0
    alone = samples(tmp_path / "alone" / "samples.jsonl")
    for folder in ("devices", "torchrun"):
        assert samples(tmp_path / folder / "samples.jsonl") == alone
        rows, expected = (
            json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in (folder, "alone")
        )
        assert len(rows) == len(expected) == 6
        for row, other in zip(rows, expected, strict=True):
            assert {**row, **dict.fromkeys(("prefill_seconds", "tokens_per_second", "peak_bytes"))} == {
                **other,
                **dict.fromkeys(("prefill_seconds", "tokens_per_second", "peak_bytes")),
            }
        assert not list((tmp_path / folder).glob("samples.*.jsonl"))


@pytest.mark.slow
def test_an_error_of_two_processes_is_one_line(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert eval([*words, f"output={tmp_path / 'run'}", "devices=2", "lengths=4000"]) == 2
    errors = capfd.readouterr().err.splitlines()
    assert [line for line in errors if "error" in line.lower()] == [
        "error: lengths=4000: expected at most 512, the model's context"
    ]


@pytest.mark.parametrize("cut", [0, 40])
def test_a_killed_run_that_is_resumed_equals_an_uninterrupted_one(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    alone = measure(loaded, tmp_path / "alone", 1)
    (tmp_path / "killed").mkdir()
    child = os.fork()
    if child == 0:  # is killed in the second of five batches, in the middle of a line or behind it
        plain, counts = Store.add, []

        def dies(self: Store, records: list[dict[str, Any]]) -> None:
            counts.append(1)
            plain(self, records)
            if len(counts) == 6:
                with self.file.open("r+b") as file:
                    file.truncate(file.seek(0, os.SEEK_END) - cut)
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Store, "add", dies)
        families, jobs = [Text(text_prompts(9))], jobs_of(loaded[0], policies("snapkv"), KEEPS)
        runner.run(loaded[0], families, jobs, Store(tmp_path / "killed" / "samples.jsonl"), Packing(2))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    stored = (tmp_path / "killed" / "samples.jsonl").read_text()
    assert len(stored.splitlines()) == 12
    assert stored.endswith("\n") == (cut == 0)
    resumed = measure(loaded, tmp_path / "killed", 1)
    if cut:  # the row whose line is lost is read alone
        alone = [{**one, **{key: pytest.approx(one[key], abs=1e-5) for key in ("kl", "loss")}} for one in alone]
    assert resumed == alone
