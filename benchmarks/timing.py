"""How a call is timed.

On a GPU every contender's calls are captured in a CUDA graph that goes round between input sets, at least two and
together at least four times the L2 cache, so that no call finds its inputs there and the host's launches do not count;
the replay is divided by the number of calls. Clearing the cache before each call, as `do_bench` does, leaves a cache of
written lines that the next 10 microseconds or so write back: it is used for calls of a millisecond and more, and for
calls that cannot be captured. All contenders take turns, twice: what differs by less than the two turns is noise.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]

CACHE_SETS = 4 * 60 * 2**20
"""Bytes that a round of input sets should exceed: four times the L2 cache of an H200."""

_LONG_US = 1000.0
_REPLAYS = 12


@dataclass(frozen=True)
class Timing:
    """Microseconds per call, twice."""

    us: float
    repeat_us: float
    how: str
    """"graph", "do_bench" or "host" (a CPU: meaningless but for trying out)."""


def input_sets(set_bytes: float, dry_run: bool) -> int:
    """How many input sets of `set_bytes` a contender needs."""
    return 1 if dry_run else max(2, -(-CACHE_SETS // max(int(set_bytes), 1)))


def race(contenders: Mapping[str, Sequence[Call]], captured: bool = True) -> dict[str, Timing | str]:
    """Time contenders against each other; each has one call per input set. Without `captured`, none in a graph.

    Returns the timing, or in one line why there is none: a contender that fails does not stop the others.
    """
    timers: dict[str, tuple[Callable[[], float], str]] = {}
    failed: dict[str, Timing | str] = {}
    for name, calls in contenders.items():
        try:
            timers[name] = _timer(calls, captured)
        except Exception as error:
            failed[name] = one_line(error)
            _settle()
    turns: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(2):
        for name, (measure, _how) in timers.items():
            turns[name].append(measure())
    found: dict[str, Timing | str] = {
        name: Timing(first, again, timers[name][1]) for name, (first, again) in turns.items()
    }
    return {name: (found | failed)[name] for name in contenders}


def one_line(error: BaseException) -> str:
    """An exception as a word on what it was."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:200]}"


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _timer(calls: Sequence[Call], captured: bool) -> tuple[Callable[[], float], str]:
    """Something that measures microseconds per call, after everything was compiled and warmed up."""
    if not torch.cuda.is_available():
        calls[0]()
        return lambda: _host_us(calls[:1]), "host"
    estimate = _warm_up(calls)
    if captured and estimate < _LONG_US and (graph := capture(_rounds(calls, estimate))) is not None:
        return lambda: _replay_us(graph, len(_rounds(calls, estimate))), "graph"
    from triton.testing import do_bench

    turn = itertools.cycle(calls)
    return lambda: 1e3 * do_bench(lambda: next(turn)(), warmup=25, rep=100, return_mode="median"), "do_bench"


def _host_us(calls: Iterable[Call]) -> float:
    begin = time.perf_counter()
    for call in calls:
        call()
    return 1e6 * (time.perf_counter() - begin)


def _warm_up(calls: Sequence[Call]) -> float:
    """Run everything on a side stream, as a capture wants it; microseconds of one call, launches included."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in (calls[0], *calls):
            call()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        for call in calls:
            call()
        events[1].record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    elapsed: float = events[0].elapsed_time(events[1])
    return 1e3 * elapsed / len(calls)


def _rounds(calls: Sequence[Call], estimate: float) -> list[Call]:
    """Whole rounds over the input sets, some two milliseconds long and of 20 to 50 calls where those are short."""
    wanted = min(max(2000 / max(estimate, 1), len(calls)), 50)
    return list(calls) * max(1, round(wanted / len(calls)))


def capture(calls: Sequence[Call]) -> "torch.cuda.CUDAGraph | None":
    """The calls, already warmed up, as a CUDA graph; None where they cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):  # left whatever happens, other than by torch.cuda.graph
            graph.capture_begin()
            try:
                for call in calls:
                    call()
            finally:
                graph.capture_end()
    except RuntimeError as error:
        print("not captured:", one_line(error), flush=True)
        _settle()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replay_us(graph: "torch.cuda.CUDAGraph", calls: int) -> float:
    spans = []
    for _ in range(_REPLAYS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        spans.append((begin, end))
    torch.cuda.synchronize()
    elapsed: list[float] = [begin.elapsed_time(end) for begin, end in spans]
    return 1e3 * statistics.median(elapsed) / calls
