"""The code that only a GPU reaches, run on a device that pretends to be one: events by the host's clock, graphs that
call again what was called between the beginning and the end of their capture.
"""

import contextlib
import time
import types
from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import ceilings, decode, prefill, timing, train_step
from benchmarks.results import Part
from benchmarks.shapes import LLAMA_8B
from benchmarks.timing import Timing, race

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one")


class Event:
    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        self.at  # noqa: B018  recorded before it is waited for

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        assert isinstance(other, Stream)


class CapturedGraph:
    """What is called while it captures is counted; calls themselves cannot be repeated."""

    capturing = False
    replays = 0

    def capture_begin(self) -> None:
        CapturedGraph.capturing = True

    def capture_end(self) -> None:
        assert CapturedGraph.capturing
        CapturedGraph.capturing = False

    def replay(self) -> None:
        assert not CapturedGraph.capturing
        CapturedGraph.replays += 1
        time.sleep(1e-4)


@contextlib.contextmanager
def stream(one: Stream) -> Iterator[None]:
    assert isinstance(one, Stream)
    yield


@pytest.fixture
def on_meta_device(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "is_available": lambda: True,
        "get_device_name": lambda: "Pretended",
        "get_device_properties": lambda device: types.SimpleNamespace(multi_processor_count=1),
        "Event": Event,
        "Stream": Stream,
        "stream": stream,
        "current_stream": Stream,
        "CUDAGraph": CapturedGraph,
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 1000,
        "max_memory_reserved": lambda: 2000,
    }
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    for script in (ceilings, decode, prefill, train_step):
        monkeypatch.setattr(script, "device", lambda dry_run: torch.device("cpu"))


def do_bench(call: Callable[[], object], warmup: int, rep: int, return_mode: str) -> float:
    assert return_mode == "median"
    begin = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begin)


def test_a_race_goes_round_the_input_sets(on_meta_device: None) -> None:
    called: list[int] = []
    calls = [lambda at=at: called.append(at) for at in range(3)]
    found = race({"ours": calls, "slow": [lambda: time.sleep(2e-3)] * 2})
    ours, slow = found["ours"], found["slow"]
    assert isinstance(ours, Timing)
    assert ours.how == "graph"
    assert isinstance(slow, Timing)
    assert slow.how == "do_bench"
    # Once more the first, all twice to warm up, then whole rounds of about 50 calls while capturing.
    assert called[:7] == [0, 0, 1, 2, 0, 1, 2]
    captured = called[7:]
    assert captured == [0, 1, 2] * (len(captured) // 3)
    assert len(captured) == pytest.approx(50, abs=3)
    assert ours.us == pytest.approx(1e6 * 1e-4 / len(captured), rel=5)
    assert slow.us >= 2000


def test_what_cannot_be_captured_is_timed_as_it_is(on_meta_device: None) -> None:
    def fail_in_capture() -> None:
        if CapturedGraph.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    found = race({"waits": [fail_in_capture], "not asked": [lambda: None]}, captured=False)
    assert {one.how for one in found.values() if isinstance(one, Timing)} == {"do_bench"}
    (one,) = race({"waits": [fail_in_capture]}).values()
    assert isinstance(one, Timing)
    assert one.how == "do_bench"
    assert not CapturedGraph.capturing


def test_ceilings(on_meta_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each measure is told of a dry run by itself, so that sizes stay small.
    monkeypatch.setattr(ceilings, "NODES", 20)
    rows = []
    for measure in (ceilings.matrix, ceilings.launches, ceilings.bandwidths):
        part = Part(None, "ceilings", dry_run=False)
        with monkeypatch.context() as patch:
            patch.setattr(ceilings, "SIZE", 64)
            patch.setattr(ceilings, "COUNT", 2**13)
            measure(part, torch.device("cpu"), False)
        rows += part.rows
    assert [row["kernel"] for row in rows] == ["flops", "t_node_us", "host_op_us", "bw_copy", "bw_read"]
    assert all(row["value"] > 0 for row in rows)


def test_decode(on_meta_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = decode.generate
    monkeypatch.setattr(decode, "generate", lambda *args, graph, **options: eager(*args, graph=False, **options))
    monkeypatch.setattr(decode, "settings", decode.dry_settings)
    for name in ("WARM", "STEPS"):
        monkeypatch.setattr(decode, name, 2)
    rows = decode.main([]).rows
    assert {row["impl"] for row in rows} == set(decode.CONTENDERS)
    assert [row for row in rows if "failed" in row] == []
    assert all(row["peak_gb"] == 1e-6 and row["reserved_gb"] == 2e-6 for row in rows)
    assert {row["how"] for row in rows if row["impl"] in (decode.FULL, decode.OURS)} == {"graph"}


def test_a_failure_is_a_row(on_meta_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    monkeypatch.setattr(decode.fill, "compressed", refuse)
    monkeypatch.setattr(decode, "settings", lambda: decode.dry_settings()[:1])
    part = decode.main([])
    failed = {row["impl"]: row["failed"] for row in part.rows if "failed" in row}
    assert set(failed) == {decode.OURS, decode.OURS_EAGER}
    assert part.document["finished"]
    assert failed[decode.OURS].startswith("OutOfMemoryError: CUDA out of memory")


def test_prefill_and_training(on_meta_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for script in (prefill, train_step):
        monkeypatch.setattr(script, "LLAMA_8B", LLAMA_8B.tiny())
    monkeypatch.setattr(prefill, "PROMPTS", {120: 2, 130: 1})
    rows = prefill.main([]).rows
    assert [row for row in rows if "failed" in row] == []
    assert len(rows) == 8
    assert {row["how"] for row in rows} == {"events"}
    assert {row["peak_gb"] for row in rows} == {1e-6}
    monkeypatch.setattr(train_step, "TRIED", [(LLAMA_8B.tiny(), 60, 5)])
    rows = train_step.main([]).rows
    assert len(rows) == 3
    assert [row for row in rows if "failed" in row] == []


def test_rounds_are_whole_and_some_two_milliseconds_long() -> None:
    calls = [lambda: None] * 16
    assert len(timing._rounds(calls, 4.0)) == 48  # at most 50
    assert len(timing._rounds(calls[:2], 27.0)) == 50
    assert len(timing._rounds(calls[:2], 500.0)) == 4
    assert len(timing._rounds(calls, 900.0)) == 16  # every set once
