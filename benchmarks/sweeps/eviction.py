"""What eviction adds to reading a prompt: scores of the last queries, selection, copying; each against PyTorch."""

import torch
from torch import Tensor

from benchmarks import limits
from benchmarks.results import Clock, Part
from benchmarks.shapes import LLAMA_8B, QWEN_7B, Shape
from benchmarks.timing import Timing, input_sets, race
from learnkv.ops.arguments import Ragged
from learnkv.ops.gather_kv import gather_kv
from learnkv.ops.select import select
from learnkv.ops.window_scores import window_scores

WINDOW, POOLED = 32, 7


def run(part: Part, device: torch.device, clock: Clock, dry_run: bool) -> None:
    """Measure everything until time is up."""
    tiny = LLAMA_8B.tiny()
    scored = [(LLAMA_8B, 1, 131072), (LLAMA_8B, 1, 32768), (LLAMA_8B, 4, 32768), (LLAMA_8B, 1, 8192)]
    scored += [(QWEN_7B, 1, 131072), (LLAMA_8B, 4, 8192)]
    chosen = [(8, 131072), (256, 131072), (8, 32768), (256, 32768), (2048, 32768)]
    copied = [(LLAMA_8B, 1, 32768, 512), (LLAMA_8B, 8, 32768, 3277), (LLAMA_8B, 1, 131072, 13107)]
    if dry_run:
        scored, chosen, copied = [(tiny, 2, 200)], [(4, 300)], [(tiny, 2, 200, 20)]
    for row in range(max(len(scored), len(chosen), len(copied))):
        for measure, wanted in ((scores, scored), (selection, chosen), (copy_kept, copied)):
            if clock.over():
                return
            if row < len(wanted):
                measure(part, device, dry_run, *wanted[row])


def scores(part: Part, device: torch.device, dry_run: bool, shape: Shape, batch: int, slots: int) -> None:
    """Window scores with and without the normalisers that the attention to the prompt could hand over."""
    heads, window = shape.kv_heads, WINDOW if not dry_run else 8
    for passes, case in ((2, "two readings"), (1, "one reading")):
        work = limits.window_scores(batch, heads, shape.group, window, slots, shape.dim, passes)

        def call(impl: str, passes: int = passes) -> object:
            queries = torch.randn(batch, shape.heads, window, shape.dim, device=device, dtype=torch.bfloat16)
            keys = torch.randn(batch, heads, slots, shape.dim, device=device, dtype=torch.bfloat16)
            lse = torch.full((batch, shape.heads, window), 12.0, device=device) if passes == 1 else None
            places = torch.arange(slots, device=device).expand(batch, slots)
            there = torch.ones(batch, slots, dtype=torch.bool, device=device)
            return lambda: window_scores(
                queries,
                keys,
                query_positions=places[:, slots - window :],
                positions=places.unsqueeze(1).expand(batch, heads, slots),
                valid=there.unsqueeze(1).expand(batch, heads, slots),
                scaling=shape.dim**-0.5,
                kernel_size=POOLED,
                lse=lse,
                impl=impl,  # type: ignore[arg-type]
            )

        sets = input_sets(work.bytes, dry_run)
        ours = [call("triton") for _ in range(sets)]
        # What it replaces makes several tensors of heads x window x slots, of single precision.
        theirs = [call("reference") for _ in range(min(sets, 2))]
        found = race({"learnkv": ours, "torch": theirs})  # type: ignore[dict-item]
        for impl, timing in found.items():
            one = (ours if impl == "learnkv" else theirs)[0]
            numbers = 4 * batch * shape.heads * window * slots
            part.add(
                timing,
                work,
                kernel="window_scores",
                impl=impl,
                case=case,
                model=shape.name,
                B=batch,
                T=slots,
                dtype="bfloat16",
                temporaries=extra_bytes(one, device) / numbers if isinstance(timing, Timing) else None,
            )


def extra_bytes(call: object, device: torch.device) -> float:
    """Bytes that a call allocates at its peak beyond what it returns; 0 without a GPU."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    made = call()  # type: ignore[operator]
    torch.cuda.synchronize()
    assert isinstance(made, Tensor)
    return torch.cuda.max_memory_allocated() - before - made.nbytes


def selection(part: Part, device: torch.device, dry_run: bool, rows: int, slots: int) -> None:
    """A tenth of every row, against a top-k and a sort of what it found; scores as attention makes them."""
    kept = slots // 10
    work = limits.select(rows, slots)
    sets = input_sets(rows * slots * 4, dry_run)
    made = [torch.randn(rows, slots, device=device).mul(3).softmax(-1) for _ in range(sets)]
    budget = torch.full((rows,), kept, device=device)

    def ours(one: Tensor) -> object:
        return lambda: select(one, budget, rows * kept, impl="triton")

    def theirs(one: Tensor) -> object:
        return lambda: one.topk(kept, -1, sorted=False).indices.sort(-1).values

    calls = {"learnkv": [ours(one) for one in made], "torch.topk, sort": [theirs(one) for one in made]}
    found = race(calls)  # type: ignore[arg-type]
    for impl, timing in found.items():
        part.add(timing, work, kernel="select", impl=impl, rows=rows, T=slots, budget=kept, dtype="float32")


def copy_kept(part: Part, device: torch.device, dry_run: bool, shape: Shape, batch: int, slots: int, kept: int) -> None:
    """One layer's keys and values into the pool, against two index_select; what is kept lies scattered."""
    rows, dim = batch * shape.kv_heads, shape.dim
    work = limits.gather_kv(rows * kept, dim)
    sets = min(input_sets(work.bytes, dry_run), 64)  # each set holds the whole prompt
    length = torch.full((rows,), kept, device=device)
    offset = length.cumsum(0) - length
    ours, theirs = [], []
    for _ in range(sets):
        keys, values = (torch.randn(rows, slots, dim, device=device, dtype=torch.bfloat16) for _ in range(2))
        index = select(torch.rand(rows, slots, device=device), length, rows * kept)
        pools = [torch.full((rows * kept, dim), torch.nan, device=device, dtype=torch.bfloat16) for _ in range(2)]

        def gather(keys=keys, values=values, index=index, pools=pools) -> None:  # type: ignore[no-untyped-def]
            gather_kv(keys, values, index, 0, Ragged(pools[0], pools[1], offset, length, kept), impl="triton")

        def copy(keys=keys, values=values, index=index, pools=pools) -> None:  # type: ignore[no-untyped-def]
            torch.index_select(keys.view(-1, dim), 0, index, out=pools[0])
            torch.index_select(values.view(-1, dim), 0, index, out=pools[1])

        ours.append(gather)
        theirs.append(copy)
    found = race({"learnkv": ours, "torch.index_select": theirs})
    for impl, timing in found.items():
        part.add(
            timing,
            work,
            kernel="gather_kv",
            impl=impl,
            model=shape.name,
            B=batch,
            T=slots,
            budget=kept,
            rows=rows,
            dtype="bfloat16",
        )
