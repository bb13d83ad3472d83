"""Attention of one new token to ragged rows.

The op, torch's flash attention on the same rows, a copy of the cache first, and SDPA where all rows hold a full prompt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import limits
from benchmarks.peers import sdpa, varlen
from benchmarks.results import Clock, Part
from benchmarks.shapes import LLAMA_8B, QWEN_05B, QWEN_7B, Shape
from benchmarks.timing import Call, input_sets, race
from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention

TAIL, CAPACITY = 16, 64
"""Slots of the tail in use and allocated."""

SHARE = 0.2
"""Part of the budget that AdaKV gives to every head alike."""


def row_lengths(batch: int, heads: int, kept: int, skew: str) -> list[int]:
    """Entries of the B * H rows of a layer, heads * kept for every row of the batch (or in all, for "dominant").

    "adakv": a fifth of the budget evenly, the rest as attention mass might fall, log-normal; the largest row holds
    between two and five times the mean. "dominant": one row holds all but one entry of every other.
    """
    if skew == "uniform":
        return [kept] * (batch * heads)
    if skew == "dominant":
        others = batch * heads - 1
        return [1] * others + [batch * heads * kept - others]
    weights = torch.randn(batch, heads, generator=torch.Generator().manual_seed(0)).mul(1.2).softmax(-1)
    wanted = kept * (SHARE + (1 - SHARE) * heads * weights.double())
    whole = wanted.long()
    missing = heads * kept - whole.sum(-1, keepdim=True)
    order = (wanted - whole).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (order < missing)).flatten().tolist()


@dataclass(frozen=True)
class Case:
    """One layer of a model at one step."""

    shape: Shape
    batch: int
    kept: int
    skew: str
    whole: bool = False
    """The rows are full prompts, which SDPA can read too."""

    @property
    def rows(self) -> int:
        return self.batch * self.shape.kv_heads


def cases() -> list[Case]:
    """What is measured, most important first; whole prompts are what an ideal full cache reads."""
    budgets = (512, 2048, 3277, 128, 1024, 13107)
    found = [
        Case(shape, batch, kept, skew)
        for shape in (LLAMA_8B, QWEN_7B)
        for batch in (8, 32, 1)
        for kept in budgets
        for skew in ("uniform", "adakv")
    ]
    found += [Case(LLAMA_8B, batch, 2048, "dominant") for batch in (8, 32, 1)]
    found += [Case(QWEN_05B, batch, 2048, skew) for batch in (8, 32) for skew in ("uniform", "adakv")]
    prompts = ((8, 32768), (1, 131072), (1, 32768), (32, 8192), (8, 131072), (8, 8192), (1, 8192))
    full = [Case(LLAMA_8B, batch, prompt, "uniform", whole=True) for batch, prompt in prompts]
    return [*found[:24], *full[:2], *found[24:], *full[2:]]


def dry_cases() -> list[Case]:
    """The same kinds of cases, small."""
    tiny = LLAMA_8B.tiny()
    return [Case(tiny, 2, 40, "uniform"), Case(tiny, 2, 40, "adakv"), Case(tiny, 1, 70, "uniform", whole=True)]


def run(part: Part, device: torch.device, clock: Clock, dry_run: bool) -> None:
    """Measure all cases until time is up."""
    if (why := varlen.missing()) is not None:
        print("no varlen peer:", why, flush=True)
    for case in dry_cases() if dry_run else cases():
        if clock.over():
            return
        measure(part, case, device, dry_run)


def measure(part: Part, case: Case, device: torch.device, dry_run: bool) -> None:
    """One race."""
    shape = case.shape
    lengths = row_lengths(case.batch, shape.kv_heads, case.kept, case.skew)
    work = limits.decode_attention(sum(lengths) + TAIL * case.rows, case.rows, shape.group, shape.dim)
    sets = input_sets(work.bytes, dry_run)
    made = [Inputs.random(case, lengths, device) for _ in range(sets)]
    contenders: dict[str, list[Call]] = {"learnkv": [one.ours() for one in made]}
    if varlen.missing() is None:
        contenders[varlen.NAME] = [one.varlen() for one in made]
        if case.batch == 8:
            contenders["AdaKV-style copy, then flash varlen"] = [one.varlen(copy=True) for one in made]
    if case.whole:
        contenders |= {name: [one.sdpa(backend) for one in made] for name, backend in sdpa.BACKENDS.items()}
    found = race(contenders)
    for name, timing in found.items():
        error = None if isinstance(timing, str) else made[0].error(contenders[name][0])
        part.add(
            timing,
            work,
            kernel="decode_attention",
            impl=name,
            model=shape.name,
            B=case.batch,
            budget=case.kept,
            skew=case.skew,
            rows=case.rows,
            longest=max(lengths),
            dtype="bfloat16",
            err=error,
            T=case.kept if case.whole else None,
        )


@dataclass
class Inputs:
    """One set of inputs; peers that know no tail get its entries at the end of every row of a pool of their own."""

    case: Case
    lengths: list[int]
    query: Tensor
    keys: Tensor
    values: Tensor
    tail_keys: Tensor
    tail_values: Tensor
    offset: Tensor
    length: Tensor
    tail_length: Tensor

    @classmethod
    def random(
        cls, case: Case, lengths: list[int], device: torch.device, dtype: torch.dtype = torch.bfloat16
    ) -> "Inputs":
        shape, entries = case.shape, sum(lengths)

        def numbers(*size: int) -> Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        length = torch.tensor(lengths, device=device)
        return cls(
            case,
            lengths,
            numbers(case.batch, shape.heads, 1, shape.dim),
            numbers(entries, shape.dim),
            numbers(entries, shape.dim),
            numbers(case.batch, shape.kv_heads, CAPACITY, shape.dim),
            numbers(case.batch, shape.kv_heads, CAPACITY, shape.dim),
            length.cumsum(0) - length,
            length,
            torch.tensor([TAIL], device=device, dtype=torch.int32),
        )

    @property
    def scaling(self) -> float:
        return 1 / math.sqrt(self.case.shape.dim)

    def ours(self) -> Callable[[], Tensor]:
        """The op as the decode loop calls it within a graph: a tail of fixed capacity, lengths on the device."""
        kept = Ragged(self.keys, self.values, self.offset, self.length, max(self.lengths))
        tail = Tail(self.tail_keys, self.tail_values, used=self.tail_length)
        return lambda: decode_attention(self.query, kept, tail, self.scaling, impl="triton")[0].flatten()

    def _joined(self, pool: Tensor, tail: Tensor) -> Tensor:
        """[N + rows * TAIL, D]: every row followed by its tail."""
        tails = tail.flatten(0, 1)[:, :TAIL]
        return torch.cat([part for pair in zip(pool.split(self.lengths), tails, strict=True) for part in pair])

    def varlen(self, copy: bool = False) -> Callable[[], Tensor]:
        """Flash attention for unequal sequences; with `copy` after the whole cache was written anew, at best speed."""
        keys, values = self._joined(self.keys, self.tail_keys), self._joined(self.values, self.tail_values)
        whole = [length + TAIL for length in self.lengths]
        ends = varlen.sequence_starts(whole, keys.device)
        asks = varlen.sequence_starts([1] * len(whole), keys.device)
        query = self.query.view(self.case.rows, self.case.shape.group, self.case.shape.dim)

        def attend() -> Tensor:
            held = (keys.clone(), values.clone()) if copy else (keys, values)
            return varlen.attend(query, *held, asks, ends, max(whole), self.scaling).flatten()

        return attend

    def sdpa(self, backend: torch.nn.attention.SDPBackend) -> Callable[[], Tensor]:
        """SDPA over rows of equal length."""
        shape = (self.case.batch, self.case.shape.kv_heads, self.lengths[0] + TAIL, self.case.shape.dim)
        keys = self._joined(self.keys, self.tail_keys).view(shape)
        values = self._joined(self.values, self.tail_values).view(shape)
        return lambda: sdpa.attend(self.query, keys, values, backend).flatten()

    def error(self, call: Call) -> float:
        """Relative error of some rows, the longest among them, against float64."""
        got = call()
        assert isinstance(got, Tensor)
        group, dim = self.case.shape.group, self.case.shape.dim
        got = got.view(self.case.rows, group, dim).double()
        asked = self.query.view(self.case.rows, group, dim).double()
        longest = self.lengths.index(max(self.lengths))
        off, size = 0.0, 0.0
        for row in {0, longest, self.case.rows // 2, self.case.rows - 1}:
            at = slice(sum(self.lengths[:row]), sum(self.lengths[: row + 1]))
            keys, values = (
                torch.cat([pool[at], tail.flatten(0, 1)[row, :TAIL]]).double()
                for pool, tail in ((self.keys, self.tail_keys), (self.values, self.tail_values))
            )
            truth = (asked[row] @ keys.T * self.scaling).softmax(-1) @ values
            off += float((got[row] - truth).square().sum())
            size += float(truth.square().sum())
        return math.sqrt(off / size)
