"""Reading a prompt with and without compression, time and peak memory: `python -m benchmarks.prefill --out FILE`."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from benchmarks import limits
from benchmarks.decode import free
from benchmarks.limits import Work
from benchmarks.results import Clock, Part, arguments, device
from benchmarks.shapes import LLAMA_8B, Shape
from benchmarks.timing import Timing, one_line
from learnkv import Policy, attach, prefill
from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.uniform import Uniform
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.scorers.snapkv import SnapKV

Made = TypeVar("Made")

KEEP = 0.1
PROMPTS = {32768: 2, 131072: 1}
"""Tokens, and how often they are read: at 128k it takes ten seconds."""


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    where = device(options.dry_run)
    part = Part(options.out, "prefill", options.dry_run)
    clock = Clock(options.seconds)
    shape = LLAMA_8B.tiny() if options.dry_run else LLAMA_8B
    model = attach(shape.build(where))
    for prompt, times in ({96: 1} if options.dry_run else PROMPTS).items():
        if clock.over():
            return part
        measure(part, model, shape, prompt, times, clock)
    part.finish()
    return part


def measure(part: Part, model: PreTrainedModel, shape: Shape, prompt: int, times: int, clock: Clock) -> None:
    """One prompt: read alone, what compression adds, and read while every layer is evicted at once."""
    ids = torch.randint(1, shape.vocabulary, (1, prompt), device=model.device)
    window = 8 if prompt < 1000 else 32
    adaptive, even = (Policy(SnapKV(window=window), allocator) for allocator in (AdaKV(), Uniform()))
    work = Work(shape.streamed, limits.prefill(shape.linear, shape.heads * shape.dim, shape.layers, prompt))
    about: dict[str, Any] = {"kernel": "prefill", "model": shape.name, "B": 1, "T": prompt, "dtype": "bfloat16"}

    def read(**options: Any) -> Callable[[], CompressedCache]:
        return lambda: prefill(model, ids, window=window, **options)

    if times > 1:
        warm = ids[:, : prompt // 8]
        for policy in (adaptive, even):  # kernels are compiled, libraries choose theirs
            prefill(model, warm, policy=policy, keep=KEEP)
    alone, peak, cache = spent(read(), times)
    part.add(alone, work, impl="full cache", peak_gb=peak, cache_bytes=held(cache), **about)
    if cache is None or isinstance(alone, str):
        return
    for case, policy in (("compress, AdaKV", adaptive), ("compress, SnapKV", even)):

        def compress(policy: Policy = policy, cache: CompressedCache = cache) -> CompressedCache:
            return policy.compress(cache.fork(), keep=KEEP)

        added, peak, small = spent(compress, 3)
        part.add(
            added,
            impl="learnkv",
            case=case,
            budget=int(KEEP * prompt),
            peak_gb=peak,
            cache_bytes=held(small),
            bytes_over_formula=None if small is None else small.nbytes / (KEEP * prompt * shape.token_bytes),
            overhead_percent=None if isinstance(added, str) else 100 * added.us / alone.us,
            **about,
        )
        del small, compress
    del cache
    if clock.over():
        return
    once, peak, small = spent(read(policy=even, keep=KEEP), times)
    part.add(
        once,
        work,
        impl="learnkv",
        case="one-shot",
        budget=int(KEEP * prompt),
        peak_gb=peak,
        cache_bytes=held(small),
        **about,
    )


def held(cache: CompressedCache | None) -> int | None:
    """Bytes that a cache holds."""
    return None if cache is None else cache.nbytes


def spent(call: Callable[[], Made], times: int) -> tuple[Timing | str, float | None, Made | None]:
    """Microseconds by the device's clock (the fastest and the slowest of `times`), peak memory in GB, what was made."""
    free()
    cuda = torch.cuda.is_available()
    clocks: list[float] = []
    made: Made | None = None
    try:
        for _ in range(times):
            made = None  # two of them may not fit
            begin, end = _events(cuda)
            begin.record()
            made = call()
            end.record()
            end.synchronize()
            clocks.append(1e3 * begin.elapsed_time(end))
    except Exception as error:
        return one_line(error), None, None
    peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
    return Timing(min(clocks), max(clocks), "events" if cuda else "host"), peak, made


def _events(cuda: bool) -> tuple[Any, Any]:
    """Events before and after what is timed."""
    kind: Any = partial(torch.cuda.Event, enable_timing=True) if cuda else _HostEvent
    return kind(), kind()


class _HostEvent:
    """A CPU's stand-in for an event of the device."""

    def record(self) -> None:
        import time

        self.at = time.perf_counter()

    def synchronize(self) -> None:
        """Nothing runs behind the host's back."""

    def elapsed_time(self, end: "_HostEvent") -> float:
        return 1e3 * (end.at - self.at)


if __name__ == "__main__":
    main()
