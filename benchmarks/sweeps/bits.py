"""Attention of one new token to entries in fewer bits, and what it takes to make them.

Every width is a row of its own, with the limit of its own bytes; 16 bits is the op as it reads a plain cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import limits
from benchmarks.results import Clock, Part
from benchmarks.shapes import LLAMA_8B, Shape
from benchmarks.sweeps.decode import CAPACITY, TAIL
from benchmarks.timing import Call, input_sets, race
from learnkv.ops.arguments import Codes, Ragged, Tail, Tier
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.hadamard import hadamard
from learnkv.ops.quantize import Quantized, dequantize, empty, quantize, quantize_entries

LEVELS = ((16, 16), (4, 4), (8, 8), (3, 3), (2, 2), (8, 4), (4, 3))
"""Bits of keys and of values."""


@dataclass(frozen=True)
class Case:
    """One layer of a model at one step: `kept` entries in each of its rows."""

    shape: Shape
    batch: int
    kept: int

    @property
    def rows(self) -> int:
        return self.batch * self.shape.kv_heads


CASES = [Case(LLAMA_8B, 8, 4096), Case(LLAMA_8B, 8, 13107), Case(LLAMA_8B, 1, 32768), Case(LLAMA_8B, 8, 512)]
DRY_CASES = [Case(LLAMA_8B.tiny(), 1, 40)]


def run(part: Part, device: torch.device, clock: Clock, dry_run: bool) -> None:
    """Measure all cases until time is up."""
    for case in DRY_CASES if dry_run else CASES:
        for levels in LEVELS:
            if clock.over():
                return
            measure(part, case, levels, device, dry_run)
        if not clock.over():
            measure_eviction(part, case, device, dry_run)


def measure(part: Part, case: Case, levels: tuple[int, int], device: torch.device, dry_run: bool) -> None:
    """The time of one width."""
    shape = case.shape
    work = limits.decode_tiers(case.rows * case.kept, case.rows, TAIL, shape.group, shape.dim, *levels)
    made = [Inputs.random(case, levels, device) for _ in range(input_sets(work.bytes, dry_run))]
    (timing,) = race({"learnkv": [one.attend() for one in made]}).values()
    part.add(
        timing,
        work,
        kernel="decode_tiers",
        impl="learnkv",
        model=shape.name,
        case=f"k{levels[0]}v{levels[1]}",
        B=case.batch,
        budget=case.kept,
        rows=case.rows,
        dtype="bfloat16",
        err=None if isinstance(timing, str) else made[0].error(),
    )


def measure_eviction(part: Part, case: Case, device: torch.device, dry_run: bool) -> None:
    """Gather, rotate, quantise and pack the keys of a layer, of which every other entry is kept."""
    shape, entries = case.shape, case.rows * case.kept
    for bits in (4, 3):
        work = limits.quantize_entries(entries, shape.dim, bits)
        contenders: dict[str, list[Call]] = {"learnkv": [], "torch": []}
        for _ in range(input_sets(work.bytes, dry_run)):
            source = torch.randn(case.rows, 2 * case.kept, shape.dim, device=device, dtype=torch.bfloat16)
            index = torch.arange(0, 2 * entries, 2, device=device)
            out = empty(entries, shape.dim, bits, torch.float16, device)
            for name, impl in (("learnkv", "triton"), ("torch", "reference")):
                contenders[name].append(_evict(source, index, bits, out, impl))
        for name, timing in race(contenders).items():
            sizes = {"model": shape.name, "B": case.batch, "budget": case.kept, "case": f"{bits} bits"}
            part.add(timing, work, kernel="quantize_entries", impl=name, dtype="bfloat16", **sizes)


def _evict(source: Tensor, index: Tensor, bits: int, out: Quantized, impl: str) -> Call:
    return lambda: quantize_entries(source, index, bits, rotation="hadamard", out=out, impl=impl)  # type: ignore[arg-type]


@dataclass
class Inputs:
    """One set of inputs."""

    case: Case
    query: Tensor
    kept: Ragged
    tail: Tail
    tiers: list[Tier]

    @classmethod
    def random(cls, case: Case, levels: tuple[int, int], device: torch.device) -> "Inputs":
        shape, entries = case.shape, case.rows * case.kept

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=torch.bfloat16)

        length = torch.full((case.rows,), case.kept, device=device)
        offset, none = length.cumsum(0) - length, torch.zeros_like(length)
        keys, values = numbers(entries, shape.dim), numbers(entries, shape.dim)
        slots = (case.batch, shape.kv_heads, CAPACITY, shape.dim)
        used = torch.tensor([TAIL], device=device, dtype=torch.int32)
        tail = Tail(numbers(*slots), numbers(*slots), used=used)
        query = numbers(case.batch, shape.heads, 1, shape.dim)
        if levels == (16, 16):
            return cls(case, query, Ragged(keys, values, offset, length, case.kept), tail, [])
        stored = _codes(keys, levels[0]), _codes(values, levels[1])
        basis = hadamard(shape.dim, device).unsqueeze(0)
        tier = Tier(*stored, offset.int(), length.int(), case.kept, basis, basis)
        return cls(case, query, Ragged(keys[:0], values[:0], none, none, 0), tail, [tier])

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(self.case.shape.dim)

    def attend(self) -> Callable[[], Tensor]:
        """The op as the decode loop calls it within a graph."""
        return lambda: decode_attention(
            self.query, self.kept, self.tail, self.scaling, tiers=self.tiers, impl="triton"
        )[0].flatten()

    def error(self) -> float:
        """Relative error of the first and the last row against float64, of the entries as they are stored."""
        group, dim = self.case.shape.group, self.case.shape.dim
        got = self.attend()().view(self.case.rows, group, dim).double()
        asked = self.query.view(self.case.rows, group, dim).double()
        off, size = 0.0, 0.0
        for row in (0, self.case.rows - 1):
            keys, values = (
                torch.cat([self._row(row, name), tail.flatten(0, 1)[row, :TAIL].double()])
                for name, tail in (("keys", self.tail.keys), ("values", self.tail.values))
            )
            truth = (asked[row] @ keys.T * self.scaling).softmax(-1) @ values
            off += float((got[row] - truth).square().sum())
            size += float(truth.square().sum())
        return math.sqrt(off / size)

    def _row(self, row: int, name: str) -> Tensor:
        """Keys or values of one row in the model's own basis."""
        at = slice(row * self.case.kept, (row + 1) * self.case.kept)
        if not self.tiers:
            own: Tensor = getattr(self.kept, name)[at].double()
            return own
        codes, basis = getattr(self.tiers[0], name), self.tiers[0].key_basis
        assert basis is not None
        vectors = dequantize(Quantized(codes.codes[at], codes.scale[at], codes.zero[at]), codes.bits, basis.shape[-1])
        return vectors.double() @ basis[0].double().T


def _codes(vectors: Tensor, bits: int) -> Codes:
    """Random vectors, which a rotation does not change in kind, as codes."""
    codes, scale, zero = quantize(vectors, bits)
    assert zero is not None
    return Codes(codes, scale, zero, bits)
