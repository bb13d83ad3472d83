"""Compile the kernels of the ops without a GPU: `python ahead_of_time.py 90 [word …]`, a JSON line per kernel.

The ops run on meta tensors, which have no data: a host sync raises. Every launch becomes a compilation for the given
compute capability.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from learnkv.ops.arguments import Codes, Pages, Ragged, Tail, Tier
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.gather_kv import Rerotation, gather_kv
from learnkv.ops.mask_gradient import mask_gradient
from learnkv.ops.page_bounds import page_bounds, page_scores
from learnkv.ops.quantize import dequantize, empty, quantize, quantize_entries
from learnkv.ops.rotary import Layout
from learnkv.ops.select import select, select_slots
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.ops.window_scores import window_scores

HALF = torch.bfloat16


class NoDevice:
    """The part of a triton driver that compilation needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def meta(*shape: int, dtype: torch.dtype = HALF) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def decode(
    dim: int,
    group: int,
    new: int = 1,
    dtype: torch.dtype = HALF,
    graphed: bool = False,
    lists: int = 0,
    levels: tuple[tuple[int, int], ...] = (),
    capped: bool = False,
) -> None:
    batch, heads = 8, 8
    table = meta(batch * heads, dtype=torch.int64)
    tail = meta(batch, heads, 64, dim, dtype=dtype)[:, :, :37]
    pools = [meta(100_000, dim, dtype=dtype) for _ in range(2)]
    mask, used = (meta(batch, 1, new, 37, dtype=torch.bool), meta(1, dtype=torch.int32)) if graphed else (None, None)
    decode_attention(
        meta(batch, heads * group, new, dim, dtype=dtype),
        Ragged(*pools, table, table, longest=2000),
        Tail(tail, tail, mask, used),
        dim**-0.5,
        Pages(meta(lists, 128, dtype=torch.int32), 16) if lists else None,
        [tier(batch * heads, dim, keys, values) for keys, values in levels],
        terms(heads * group, capped),
        impl="triton",
    )


def terms(heads: int, capped: bool) -> SoftmaxTerms:
    return SoftmaxTerms(50.0, meta(heads)) if capped else NO_TERMS


def tier(rows: int, dim: int, keys: int, values: int) -> Tier:
    table, basis = meta(rows, dtype=torch.int32), meta(1, dim, dim, dtype=torch.float32)
    stored = [meta(100_000, dim) if bits == 16 else coded(100_000, dim, bits) for bits in (keys, values)]
    return Tier(*stored, table, table, 2000, basis, basis)


def coded(count: int, dim: int, bits: int) -> Codes:
    made = empty(count, dim, bits, torch.float16, torch.device("meta"))
    assert made.zero is not None
    return Codes(made.codes, made.scale, made.zero, bits)


def paged(dim: int, group: int) -> None:
    rows, count, table = 64, 2048, meta(64, dtype=torch.int64)
    bounds = meta(rows, 2, count, dim)
    entries = Ragged(meta(100_000, dim), meta(100_000, dim), table, table, longest=32768)
    page_bounds(entries, table, bounds, 16, impl="triton")
    page_bounds(entries._replace(longest=4), table, bounds, 16, meta(rows, 4, dtype=torch.int64), impl="triton")
    scores = page_scores(meta(8, 8 * group, dim), bounds, table, "max", impl="triton")
    select_slots(scores, meta(rows, dtype=torch.int32), 128, impl="triton")


def window(dim: int, group: int, queries: int = 32, **options: object) -> None:
    heads, slots = 8, 32768
    window_scores(
        meta(1, heads * group, queries, dim),
        meta(1, heads, slots, dim),
        query_positions=meta(1, queries, dtype=torch.int64),
        positions=meta(1, 1, slots, dtype=torch.int64).expand(1, heads, slots),
        valid=meta(1, 1, slots, dtype=torch.bool).expand(1, heads, slots),
        scaling=0.1,
        kernel_size=7,
        impl="triton",
        **options,  # type: ignore[arg-type]
    )


def chosen() -> None:
    select(meta(256, 32768, dtype=torch.float32), meta(256, dtype=torch.int64), 100_000, impl="triton")


def gathered(dim: int, rotated: bool = False) -> None:
    table = meta(8, dtype=torch.int64)
    whole, pool = (meta(8, 32768, dim) for _ in range(2)), (meta(100_000, dim) for _ in range(2))
    frequencies = meta(dim // 2, dtype=torch.float32)
    how = Rerotation(meta(100_000, dtype=torch.int32), table, frequencies, Layout.halves(dim // 2)) if rotated else None
    out = Ragged(*pool, table, table, longest=32768)
    gather_kv(*whole, meta(100_000, dtype=torch.int64), 16, out, how, impl="triton")


def continued(dim: int, group: int, new: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B*C, H*G, T, D], keys [B, H, S, D] and a tail [B*C, H, T, D] of two prompts with four continuations."""
    query = meta(8, new, 8 * group, dim, dtype=dtype).transpose(1, 2)  # as models make it
    return query, meta(2, 8, 4000, dim, dtype=dtype), meta(8, 8, new, dim, dtype=dtype)


def gradient(
    dim: int, group: int, new: int = 64, dtype: torch.dtype = HALF, gated: bool = False, capped: bool = False
) -> None:
    query, keys, tail = continued(dim, group, new, dtype)
    table, pool = meta(64, dtype=torch.int64), meta(30_000, dim, dtype=dtype)
    mask_gradient(
        query,
        query,
        torch.empty_like(query),
        meta(8, 8 * group, new, dtype=torch.float32),
        keys,
        keys,
        Ragged(pool, pool, table, table, longest=4000),
        Tail(tail, tail, meta(8, 1, new, new, dtype=torch.bool) if gated else None),
        dim**-0.5,
        meta(30_000, dtype=torch.float32) if gated else None,
        terms(8 * group, capped),
        impl="triton",
    )


def gated(dim: int, group: int, new: int = 64, dtype: torch.dtype = HALF, capped: bool = False) -> None:
    query, keys, tail = continued(dim, group, new, dtype)
    gates, mask = meta(2, 8, 4000, dtype=torch.float32), meta(8, 1, new, new, dtype=torch.bool)
    tails = Tail(tail, tail, mask)
    gated_attention(query, keys, keys, gates, tails, dim**-0.5, terms(8 * group, capped), impl="triton")


def quantized(dim: int, bits: int, dtype: torch.dtype = HALF, rotation: str = "hadamard") -> None:
    source, index = meta(8, 32768, dim, dtype=dtype), meta(100_000, dtype=torch.int64)
    made = quantize_entries(source, index, bits, 16, rotation, impl="triton")  # type: ignore[arg-type]
    dequantize(made, bits, dim, impl="triton")
    if rotation == "none":
        quantize(source, bits, impl="triton")


FIVE = ((16, 16), (8, 4), (4, 3), (3, 2), (2, 2))
"""Bits of keys and values of as many tiers as a cache has."""

CASES: dict[str, Callable[[], None]] = {
    "decode d64 g7": lambda: decode(64, 7),
    "decode d96 g1": lambda: decode(96, 1),
    "decode d128 g4": lambda: decode(128, 4),
    "decode d128 g7 graphed": lambda: decode(128, 7, graphed=True),
    "decode d128 g4 t5": lambda: decode(128, 4, 5),
    "decode d128 g4 t64": lambda: decode(128, 4, 64),
    "decode d256 g8 t64": lambda: decode(256, 8, 64),
    "decode d128 g4 fp32": lambda: decode(128, 4, dtype=torch.float32),
    "decode d128 g4 paged": lambda: decode(128, 4, lists=64),
    "decode d128 g4 paged by query head": lambda: decode(128, 4, graphed=True, lists=256),
    "decode d64 g7 tiers": lambda: decode(64, 7, levels=((8, 3), (4, 2))),
    "decode d128 g4 tiers 88": lambda: decode(128, 4, levels=((8, 8),)),
    "decode d128 g4 tiers 44": lambda: decode(128, 4, levels=((4, 4),)),
    "decode d128 g4 tiers 33": lambda: decode(128, 4, levels=((3, 3),)),
    "decode d128 g4 tiers 22": lambda: decode(128, 4, levels=((2, 2),)),
    "decode d128 g7 graphed tiers": lambda: decode(
        128, 7, graphed=True, levels=((16, 16), (8, 4), (4, 3), (3, 2), (2, 2))
    ),
    "decode d128 g4 tiers q64": lambda: decode(128, 4, 64, levels=((4, 3), (8, 2))),
    "decode d256 g8 tiers q64": lambda: decode(256, 8, 64, levels=((4, 3),)),
    "decode d128 g4 fp32 tiers": lambda: decode(128, 4, dtype=torch.float32, levels=((4, 3),)),
    "decode d80 g4 tiers": lambda: decode(80, 4, levels=((4, 3),)),
    "decode d64 g8 terms": lambda: decode(64, 8, capped=True),
    "decode d256 g2 terms": lambda: decode(256, 2, capped=True),
    "decode d256 g2 t64 terms": lambda: decode(256, 2, 64, capped=True),
    "decode d64 g8 graphed tiers terms": lambda: decode(64, 8, graphed=True, levels=((8, 4), (4, 3)), capped=True),
    "pages d128 g4": lambda: paged(128, 4),
    "gated d128 g4": lambda: gated(128, 4),
    "gated d256 g2": lambda: gated(256, 2),
    "gated d128 g4 fp32": lambda: gated(128, 4, dtype=torch.float32),
    "gated d64 g8 terms": lambda: gated(64, 8, capped=True),
    "gradient d64 g8 terms": lambda: gradient(64, 8, capped=True),
    "gradient d256 g2 terms": lambda: gradient(256, 2, gated=True, capped=True),
    "gradient d64 g7": lambda: gradient(64, 7),
    "gradient d128 g4": lambda: gradient(128, 4),
    "gradient d128 g4 gated": lambda: gradient(128, 4, gated=True),
    "gradient d256 g2": lambda: gradient(256, 2),
    "gradient d128 g4 fp32": lambda: gradient(128, 4, dtype=torch.float32),
    "gather d128": lambda: gathered(128),
    "gather d128 rotated": lambda: gathered(128, rotated=True),
    "quantize d64 b2": lambda: quantized(64, 2),
    "quantize d128 b3": lambda: quantized(128, 3),
    "quantize d128 b4": lambda: quantized(128, 4),
    "quantize d128 b8 fp32": lambda: quantized(128, 8, torch.float32),
    "quantize d256 b4 fp32": lambda: quantized(256, 4, torch.float32),
    "quantize d80 b3 none": lambda: quantized(80, 3, rotation="none"),
    "select": chosen,
    "window d128 g4": lambda: window(128, 4),
    "window d128 g4 apart": lambda: window(128, 4, 16, group_reduce="none"),
    "window d64 g8 terms": lambda: window(64, 8, terms=terms(64, True)),
    "window d64 g7 w64 max": lambda: window(64, 7, 64, group_first=False, group_reduce="max", pooling="max"),
}


def resources(ptx: str, binary: Path) -> dict[str, int]:
    """Registers, bytes of stack (spilled registers: the kernels have no arrays) and wide accesses of a kernel."""
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "wide_copies": len(re.findall(r"cp\.async\.cg\.shared\.global .*0x10", ptx)),
        "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4\.b32|ld\.global[\w.:]*\.v2\.b64", ptx)),
        "wgmma": len(re.findall(r"wgmma\.mma_async", ptx)),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
    }


def main(capability: int, *only: str) -> None:
    driver.set_active(NoDevice(capability))
    launch, compiled = JITFunction.run, []

    def compile_only(self: JITFunction, *args: object, grid: object, warmup: bool, **options: object) -> None:
        compiled.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = compile_only
    with tempfile.TemporaryDirectory() as folder:
        for case, run in CASES.items():
            if only and not any(word in case for word in only):
                continue
            compiled.clear()
            run()
            for name, kernel in compiled:
                binary = Path(folder) / "kernel.cubin"
                binary.write_bytes(kernel.asm["cubin"])
                used = resources(kernel.asm["ptx"], binary)
                row = {
                    "case": case,
                    "kernel": name,
                    "shared": kernel.metadata.shared,
                    "warps": kernel.metadata.num_warps,
                }
                print(json.dumps(row | used), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
