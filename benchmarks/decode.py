"""Whole decode steps of whole models: `python -m benchmarks.decode --out parts/decode.json`.

Weights are random, the prompt's cache is filled without reading one. A step of an ideal full cache (buffers allocated
once, SDPA, in a CUDA graph) is what ours is compared with; transformers as shipped stands beside it.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from benchmarks import fill
from benchmarks.limits import Work
from benchmarks.peers import sdpa, transformers_caches
from benchmarks.results import Clock, Part, Row, arguments, device
from benchmarks.shapes import LLAMA_8B, QWEN_05B, QWEN_06B, QWEN_7B, Shape
from benchmarks.timing import Timing, capture, one_line
from learnkv import attach, detach, generate

OURS, OURS_EAGER, FULL = "learnkv graphed", "learnkv", "full cache graphed"
ALL = (FULL, OURS, OURS_EAGER, transformers_caches.DYNAMIC)
WARM, STEPS = 8, 64


@dataclass(frozen=True)
class Setting:
    """One model, batch and prompt; `kept` entries per head on average."""

    shape: Shape
    batch: int
    prompt: int
    kept: int
    contenders: tuple[str, ...]
    skew: str = "uniform"
    kernel: str = "decode step"


def settings() -> list[Setting]:
    """What is measured, most important first; settings of one model stand together, it is built once."""
    return [
        Setting(LLAMA_8B, 8, 32768, 512, ALL),
        Setting(LLAMA_8B, 8, 32768, 512, (OURS,), skew="adakv"),
        Setting(LLAMA_8B, 1, 131072, 2048, ALL),
        # As many rows as nine tenths of the memory hold, at a tenth of the cache ten times as many.
        Setting(LLAMA_8B, 260, 32768, 3277, (OURS,), kernel="capacity"),
        Setting(LLAMA_8B, 26, 32768, 3277, (FULL,), kernel="capacity"),
        Setting(LLAMA_8B, 1, 32768, 512, (FULL, OURS, OURS_EAGER)),
        Setting(QWEN_05B, 1, 32768, 512, ALL),
        Setting(QWEN_06B, 1, 32768, 512, ALL),
        Setting(QWEN_06B, 1, 131072, 2048, (FULL, OURS)),
        Setting(QWEN_06B, 8, 32768, 512, (FULL, OURS)),
        Setting(QWEN_7B, 8, 32768, 512, (FULL, OURS)),
        Setting(QWEN_7B, 1, 131072, 2048, (FULL, OURS)),
    ]


def static_settings() -> list[Setting]:
    """Settings of StaticCache, for which transformers compiles the model for a minute or more: apart, and last."""
    return [Setting(LLAMA_8B, 8, 32768, 512, (transformers_caches.STATIC,))]


def dry_settings() -> list[Setting]:
    """The same kinds of settings, small."""
    return [
        Setting(LLAMA_8B.tiny(), 2, 40, 8, (*ALL, transformers_caches.STATIC)),
        Setting(LLAMA_8B.tiny(), 2, 40, 8, (OURS,), skew="adakv"),
        Setting(QWEN_06B.tiny(), 1, 40, 8, (OURS, FULL), kernel="capacity"),
    ]


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(
        __doc__, argv, static={"action": "store_true", "help": "only transformers' StaticCache, which is compiled"}
    )
    where = device(options.dry_run)
    part = Part(options.out, "decode static" if options.static else "decode", options.dry_run)
    clock = Clock(options.seconds)
    wanted = dry_settings() if options.dry_run else static_settings() if options.static else settings()
    model: PreTrainedModel | None = None
    for at, setting in enumerate(wanted):
        if clock.over():
            return part
        if at == 0 or setting.shape != wanted[at - 1].shape:
            model = None
            free()
            model = setting.shape.build(where)
        assert model is not None
        for contender in setting.contenders:
            if not clock.over():
                measure(part, model, setting, contender, options.dry_run)
    part.finish()
    return part


def free() -> None:
    """Give memory back that nobody holds: two caches of 100 GB do not fit."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(part: Part, model: PreTrainedModel, setting: Setting, contender: str, dry_run: bool) -> Row:
    """One contender in one setting; a failure, memory included, is a row that says so."""
    free()
    entries = setting.kept if contender in (OURS, OURS_EAGER) else setting.prompt
    timing: Timing | str
    held = None
    try:
        with torch.no_grad():
            step, held = CONTENDERS[contender](model, setting, dry_run)
            timing = Timing(step(), step(), "graph" if contender in (OURS, FULL) and not dry_run else "host")
            del step
    except Exception as error:
        timing = one_line(error)
    finally:
        detach(model)
        model.set_attn_implementation("sdpa")
    cuda = torch.cuda.is_available()
    return part.add(
        timing,
        Work(setting.shape.step_bytes(setting.batch, entries)),
        kernel=setting.kernel,
        impl=contender,
        model=setting.shape.name,
        B=setting.batch,
        T=setting.prompt,
        budget=setting.kept,
        skew=setting.skew,
        dtype="bfloat16",
        tokens_per_s=None if isinstance(timing, str) else 1e6 * setting.batch / timing.us,
        cache_bytes=held,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if cuda else None,
    )


Step = tuple[Callable[[], float], int]
"""What measures microseconds per step, and the bytes that the cache holds."""


def ours(graph: bool) -> Callable[[PreTrainedModel, Setting, bool], Step]:
    """`learnkv.generate`, a turn of many tokens less one of few, over the tokens between them."""

    def prepare(model: PreTrainedModel, setting: Setting, dry_run: bool) -> Step:
        attach(model)
        cache = fill.compressed(model, setting.shape, setting.batch, setting.kept, setting.skew)
        fewer, more = (2, 5) if dry_run else (2 * WARM, 2 * WARM + STEPS)
        question = torch.randint(1, setting.shape.vocabulary, (setting.batch, 1), device=model.device)

        def turn(new: int) -> float:
            if cache.tail_length:
                cache.crop(-cache.tail_length)
            _synchronize()
            begin = time.perf_counter()
            said = generate(model, question, cache, max_new_tokens=new, graph=graph and not dry_run)
            _synchronize()
            assert said.shape == (setting.batch, new)
            return time.perf_counter() - begin

        turn(more)  # compiles, makes room for all that follows, and captures the graph that is replayed from here on
        return lambda: 1e6 * (turn(more) - turn(fewer)) / (more - fewer), cache.nbytes

    return prepare


def full(model: PreTrainedModel, setting: Setting, dry_run: bool) -> Step:
    """A full cache as good as it can be; of SDPA's implementations the faster one."""
    size = (setting.batch, setting.shape.kv_heads, setting.prompt, setting.shape.dim)
    cache = sdpa.full_cache(size, setting.shape.layers, next(model.parameters()))
    token = torch.randint(1, setting.shape.vocabulary, (setting.batch, 1), device=model.device)
    position = torch.full_like(token, setting.prompt - 1)

    def step() -> None:
        logits = model(input_ids=token, position_ids=position, past_key_values=cache, use_cache=True).logits
        token.copy_(logits[:, -1:].argmax(-1))

    found = []
    for name, backend in sdpa.BACKENDS.items():
        sdpa.use(model, backend)
        try:
            found.append((timer := stepper(step, dry_run), timer(), name))
        except RuntimeError as error:
            print("no", name, one_line(error), flush=True)
    if not found:
        raise RuntimeError("no implementation of SDPA reads grouped keys of a full cache")
    best = min(found, key=lambda one: one[1])
    print("full cache:", ", ".join(f"{name} {us:.0f} us" for _, us, name in found), flush=True)
    return best[0], setting.batch * setting.prompt * setting.shape.token_bytes


def stepper(step: Callable[[], None], dry_run: bool) -> Callable[[], float]:
    """Microseconds per replay of a step in a CUDA graph; of the bare step in a dry run."""
    if dry_run:
        return lambda: _host_us(step)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = capture([step])
    if graph is None:
        raise RuntimeError("the step cannot be captured")

    def replays() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(WARM):
            graph.replay()
        begin.record()
        for _ in range(STEPS):
            graph.replay()
        end.record()
        end.synchronize()
        elapsed: float = begin.elapsed_time(end)
        return 1e3 * elapsed / STEPS

    return replays


def _host_us(step: Callable[[], None]) -> float:
    begin = time.perf_counter()
    step()
    return 1e6 * (time.perf_counter() - begin)


def dynamic(model: PreTrainedModel, setting: Setting, dry_run: bool) -> Step:
    """`generate()` of transformers with its default cache."""
    cache = fill.dynamic(model, setting.shape, setting.batch, setting.prompt)
    steps = (2, 4) if dry_run else (4, 20)

    def measured() -> float:
        return transformers_caches.step_us(
            model, cache, setting.prompt, setting.batch, lambda new: cache.crop(-new), steps
        )

    measured()
    return measured, setting.batch * setting.prompt * setting.shape.token_bytes


def static(model: PreTrainedModel, setting: Setting, dry_run: bool) -> Step:
    """`generate()` of transformers with its cache of a fixed size, for which it compiles the model."""
    slots = setting.prompt + 64
    cache = fill.static(model, setting.shape, setting.batch, setting.prompt, slots)
    steps = (2, 4) if dry_run else (4, 20)

    def rewind(_: int) -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(setting.prompt)

    def measured() -> float:
        return transformers_caches.step_us(model, cache, setting.prompt, setting.batch, rewind, steps)

    measured()
    return measured, setting.batch * slots * setting.shape.token_bytes


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


CONTENDERS: dict[str, Callable[[PreTrainedModel, Setting, bool], Step]] = {
    FULL: full,
    OURS: ours(graph=True),
    OURS_EAGER: ours(graph=False),
    transformers_caches.DYNAMIC: dynamic,
    transformers_caches.STATIC: static,
}

if __name__ == "__main__":
    main()
