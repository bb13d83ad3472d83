"""What the device can do, measured in the same run as everything that is compared with it.

`python -m benchmarks.ceilings --out parts/ceilings.json`
"""

import statistics
import time
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from benchmarks.results import Part, arguments, device
from benchmarks.timing import capture

NODES, SIZE, COUNT = 1000, 8192, 2**30
"""Nodes of a graph, rows of a square matrix, numbers of single precision that are copied and read."""


@triton.jit
def _sum(numbers, sums, count, BLOCK: tl.constexpr):
    """One partial sum per program over blocks that lie a grid apart: reads everything, writes next to nothing."""
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(tl.program_id(0) * BLOCK, count, tl.num_programs(0) * BLOCK):
        total += tl.load(numbers + begin + tl.arange(0, BLOCK), eviction_policy="evict_first")
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def _nothing(number):
    return


def best_us(call: Callable[[], object], dry_run: bool) -> float:
    """Median microseconds of a call that is long enough for launches not to count."""
    if dry_run:
        begin = time.perf_counter()
        call()
        return 1e6 * (time.perf_counter() - begin)
    median: float = triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median")
    return 1e3 * median


def bandwidths(part: Part, where: torch.device, dry_run: bool) -> None:
    """Copy (bytes read plus written) and read-only stream, both over 4 GB of random numbers."""
    count = 2**13 if dry_run else COUNT
    numbers = torch.rand(count, device=where)
    target = torch.full_like(numbers, torch.nan)
    us = best_us(lambda: target.copy_(numbers), dry_run)
    part.add(kernel="bw_copy", value=2 * numbers.nbytes / us * 1e6, unit="B/s", wall_us=us)
    assert torch.equal(target[-1000:], numbers[-1000:])
    processors = 1 if dry_run else torch.cuda.get_device_properties(where).multi_processor_count
    truth = float(numbers.sum(dtype=torch.float64))
    found: list[tuple[float, str]] = []
    for per_processor, block, warps in ((2, 4096, 8), (4, 4096, 8), (4, 2048, 4), (8, 2048, 4), (16, 1024, 4)):
        sums = torch.full((per_processor * processors,), torch.nan, device=where)

        def read(sums: torch.Tensor = sums, block: int = block, warps: int = warps) -> None:
            _sum[(len(sums),)](numbers, sums, count, BLOCK=block, num_warps=warps)

        read()
        error = abs(float(sums.double().sum()) - truth) / count
        assert error < 1e-4, f"the read-only stream sums wrongly: {error}"
        found.append((best_us(read, dry_run), f"{per_processor} programs per processor, block {block}, {warps} warps"))
    found.append((best_us(lambda: numbers.sum(), dry_run), "torch.sum"))
    us, how = min(found)
    part.add(kernel="bw_read", value=numbers.nbytes / us * 1e6, unit="B/s", wall_us=us, case=how)


def matrix(part: Part, where: torch.device, dry_run: bool) -> None:
    """A square bfloat16 product of random numbers."""
    size = 64 if dry_run else SIZE
    one, two = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(one)
    us = best_us(lambda: torch.mm(one, two, out=product), dry_run)
    part.add(kernel="flops", value=2 * size**3 / us * 1e6, unit="op/s", wall_us=us)


def launches(part: Part, where: torch.device, dry_run: bool) -> None:
    """An empty kernel as a node of a CUDA graph, and what the host needs to launch a tiny operation."""
    number = torch.zeros(1, device=where)
    nodes = 10 if dry_run else NODES
    _nothing[(1,)](number)
    if dry_run:
        spent = [best_us(lambda: [_nothing[(1,)](number) for _ in range(nodes)], dry_run)]
    else:
        torch.cuda.synchronize()
        graph = capture([lambda: _nothing[(1,)](number)] * nodes)
        assert graph is not None
        spent = [replay_us(graph) for _ in range(20)]
    part.add(kernel="t_node_us", value=statistics.median(spent) / nodes, unit="us")
    host = []
    for _ in range(2 if dry_run else 12):
        if not dry_run:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(nodes):
            number.add_(1)
        host.append(1e6 * (time.perf_counter() - begin))
    part.add(kernel="host_op_us", value=statistics.median(host) / nodes, unit="us")


def replay_us(graph: "torch.cuda.CUDAGraph") -> float:
    """Microseconds of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    elapsed: float = begin.elapsed_time(end)
    return 1e3 * elapsed


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    where = device(options.dry_run)
    part = Part(options.out, "ceilings", options.dry_run)
    for measure in (bandwidths, matrix, launches):
        measure(part, where, options.dry_run)
    part.finish()
    return part


if __name__ == "__main__":
    main()
