"""The decode kernel on entries stored in fewer bits, against the reference in float64, within a worked out budget."""

import dataclasses
from typing import Any

import pytest
import torch
from support.kernels import DEVICE, ROUNDING, STORED, assert_within, capped_with_sinks, draw, poisoned
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.arguments import Codes, Ragged, Tail, Tier
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.hadamard import hadamard
from learnkv.ops.quantize import Quantized, dequantize, quantize
from learnkv.ops.softmax_terms import NO_TERMS

SPARE = 3  # entries around and between the rows whose scale is NaN


def part(vectors: Tensor, bits: int, free: Tensor, scale_dtype: torch.dtype = torch.float16) -> Codes | Tensor:
    """Vectors in `bits` bits; NaN where `free`."""
    if bits == 16:
        return vectors.masked_fill(free.unsqueeze(1), torch.nan)
    codes, scale, zero = quantize(vectors.float(), bits, scale_dtype=scale_dtype)
    assert zero is not None
    return Codes(codes.masked_fill(free.unsqueeze(1), 255), scale.masked_fill(free.unsqueeze(1), torch.nan), zero, bits)


def tier(
    lengths: list[int], dim: int, bits: tuple[int, int], seed: int, bases: tuple[Tensor | None, Tensor | None]
) -> Tier:
    """Rows of random entries; those of later entries are longer, so that the running maximum keeps moving."""
    length = torch.tensor(lengths, dtype=torch.int32)
    offset = (length.cumsum(0) - length + SPARE * torch.arange(1, len(lengths) + 1)).int()
    total = int(length.sum()) + SPARE * (len(lengths) + 1)
    free = torch.ones(total, dtype=torch.bool)
    for first, count in zip(offset.tolist(), lengths, strict=True):
        free[first : first + count] = False
    size = torch.linspace(0.5, 1.5, total, device=DEVICE).unsqueeze(1)
    stored = [
        part(draw(total, dim, seed=seed + at) * size, width, free.to(DEVICE))
        for at, width in zip((0, 1), bits, strict=True)
    ]
    return Tier(*stored, offset.to(DEVICE), length.to(DEVICE), max(lengths), *bases)


@dataclasses.dataclass
class Case:
    """One call; `tiers` has bits of keys and values, and entries of the rows, B * heads of them."""

    kept: list[int]
    tiers: dict[tuple[int, int], list[int]]
    heads: int = 2
    group: int = 2
    dim: int = 64
    new: int = 1
    tail: int = 5
    dtype: torch.dtype = torch.float32
    masked: bool = False
    capacity: int | None = None
    shared: bool = False
    rotated: tuple[bool, bool] = (True, True)
    capped: bool = False

    def inputs(self) -> dict[str, Any]:
        batch = len(self.kept) // self.heads
        basis = hadamard(self.dim, DEVICE).unsqueeze(0) if any(self.rotated) else None
        bases = tuple(basis if wanted else None for wanted in self.rotated)
        tiers = [
            tier(rows, self.dim, bits, 10 * at, bases)
            for at, (bits, rows) in enumerate(self.tiers.items())  # type: ignore[arg-type]
        ]
        if self.shared:
            row = torch.arange(self.heads, device=DEVICE).repeat(batch)
            tiers = [one._replace(offset=one.offset[row], length=one.length[row]) for one in tiers]
        length = torch.tensor(self.kept, device=DEVICE)
        pool = [draw(sum(self.kept), self.dim, seed=seed, dtype=self.dtype) for seed in (101, 102)]
        slots = self.capacity or self.tail
        tail = torch.full((2, batch, self.heads, slots, self.dim), torch.nan, device=DEVICE, dtype=self.dtype)
        tail[..., : self.tail, :] = draw(2, batch, self.heads, self.tail, self.dim, seed=103, dtype=self.dtype)
        mask = None
        if self.masked:
            mask = draw(batch, 1, self.new, slots, seed=104) > -0.5
            mask[0, 0, 0] = False  # this query sees its kept entries alone
        used = None if self.capacity is None else torch.tensor([self.tail], device=DEVICE)
        query = draw(batch, self.new, self.heads * self.group, self.dim, seed=105, dtype=self.dtype).transpose(1, 2)
        return {
            "query": query,
            "kept": Ragged(*pool, length.cumsum(0) - length, length, max(self.kept)),
            "tail": Tail(*tail, mask, used),
            "scaling": 1.2 * self.dim**-0.5,
            "tiers": tiers,
            "terms": capped_with_sinks(self.heads * self.group) if self.capped else NO_TERMS,
        }


def exactly(given: Any) -> Any:
    """The same numbers in float64; codes stay."""
    if isinstance(given, Tensor):
        return given.double() if given.is_floating_point() else given
    if isinstance(given, Codes):
        return given
    if isinstance(given, dict):
        return {name: exactly(one) for name, one in given.items()}
    if isinstance(given, Ragged | Tail | Tier):
        return type(given)(*(exactly(one) for one in given))
    return [exactly(one) for one in given] if isinstance(given, list) else given


def vectors(of: Codes | Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Entries [N, dim] in float64, and the sizes of the sums that make up a product with each of them."""
    if isinstance(of, Tensor):
        return of.double(), of.double().nan_to_num().norm(dim=-1)
    decoded = dequantize(Quantized(of.codes, of.scale, of.zero), of.bits, dim, impl="reference").double()
    zero = of.zero.double()
    parts = (decoded - zero).norm(dim=-1) + zero.abs().squeeze(-1) * dim**0.5
    return decoded, parts.nan_to_num()


def check(case: Case) -> None:
    given = case.inputs()
    with poisoned():
        output, lse = decode_attention(**given, impl="triton")
    exact = exactly(given)
    truth, log_mass = decode_attention(**exact, impl="reference")
    # Outputs of absolute values, in the model's own basis: what an error of a weight is multiplied with.
    kept, tail, tiers = exact["kept"], exact["tail"], []
    for one in exact["tiers"]:
        own = vectors(one.values, case.dim)[0]
        own = own if one.value_basis is None else own @ one.value_basis[0].T
        tiers.append(one._replace(values=own.abs(), value_basis=None))
    sizes = exact | {"tiers": tiers, "kept": kept._replace(values=kept.values.abs())}
    sizes["tail"] = tail._replace(values=tail.values.abs())
    weighed, _ = decode_attention(**sizes, impl="reference")

    unit = ROUNDING[torch.float32]
    reach = [one.nan_to_num().norm(dim=-1).flatten() for one in (kept.keys, tail.keys)]
    reach += [vectors(one.keys, case.dim)[1].flatten() for one in given["tiers"]]
    of_keys = torch.cat(reach).max()
    of_values = torch.cat([weighed.new_zeros(1), *(vectors(one.values, case.dim)[1] for one in given["tiers"])]).max()
    largest = float(exact["scaling"] * exact["query"].norm(dim=-1).max() * of_keys)
    rounded = STORED[case.dtype] if case.dtype != torch.float32 else 0.0
    # Sums of a score, and a query that is rounded once more after it is rotated.
    score_error = 6 * unit * largest + (ROUNDING[case.dtype] * largest if rounded and case.rotated[0] else 0)
    entries = sum(max(rows) for rows in case.tiers.values()) + max(case.kept) + case.tail
    sums = (entries**0.5 + 16) * unit
    relative = 2 * score_error + sums + (2 * ROUNDING[case.dtype] if rounded else 0)
    budget = relative * weighed + sums * of_values * 2 + STORED[case.dtype] * truth.abs()
    assert output.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert_within(output, truth, budget)
    assert_within(lse, log_mass, score_error + sums + unit * lse.abs())


CASES = {
    "all widths": Case([20, 0], {(8, 8): [66, 1], (4, 3): [0, 70], (3, 2): [5, 0], (2, 4): [1, 9], (16, 3): [4, 2]}),
    "nothing at full precision": Case([0, 0], {(4, 4): [130, 3]}, group=4, dim=128),
    "keys decoded, values in codes of bytes": Case([3, 3], {(4, 16): [10, 0], (3, 3): [9, 12]}, dim=16),
    "an odd head size, as it is": Case([9, 40], {(4, 3): [33, 0], (3, 8): [1, 5]}, dim=80, rotated=(False, False)),
    "bfloat16, group of 7": Case([9, 40], {(8, 4): [65, 2], (4, 2): [7, 80]}, group=7, dtype=torch.bfloat16),
    "several tokens, masked": Case([7, 0], {(4, 3): [20, 0], (2, 2): [3, 0]}, new=3, masked=True),
    "a tail of fixed capacity": Case([7, 30], {(4, 3): [20, 40]}, new=2, tail=9, capacity=40),
    "beams that share all rows": Case([5, 4, 0, 0], {(4, 3): [20, 31, 1, 1]}, shared=True, dtype=torch.bfloat16),
    "keys rotated": Case([5, 4], {(3, 4): [20, 31]}, rotated=(True, False)),
    "values rotated": Case([5, 4], {(8, 2): [20, 31]}, rotated=(False, True)),
    "nothing kept at all": Case([0, 0], {(4, 3): [0, 0]}, masked=True),
    "soft cap and sinks": Case([70, 0], {(4, 3): [66, 130], (8, 2): [3, 0]}, new=2, masked=True, capped=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_the_truth(case: Case) -> None:
    check(case)


def test_a_tile_of_queries_per_program() -> None:
    """So many queries that every tile has one program, which then reads all rows and leaves nothing to merge."""
    check(Case([70, 3], {(4, 3): [40, 7]}, group=4, dim=32, new=70, tail=70))


def test_without_tiers_nothing_changes() -> None:
    given = Case([40, 7], {(4, 3): [0, 0]}).inputs()
    plain = decode_attention(**(given | {"tiers": ()}), impl="triton")
    for one, other in zip(decode_attention(**given, impl="triton"), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2**-22)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_values_keep_their_weight(scale_dtype: torch.dtype) -> None:
    """Their scale is the smallest number of its dtype: times a weight it would be 0."""
    given = Case([0, 0], {(4, 4): [9, 30]}, rotated=(False, False)).inputs()
    (one,) = given["tiers"]
    held = torch.tensor([1.5, -0.75, 1e-20]).repeat(20)[: len(one.values.codes)].unsqueeze(1).expand(-1, 64).to(DEVICE)
    free = one.values.scale.isnan().squeeze(1)
    given["tiers"] = [one._replace(values=part(held, 4, free, scale_dtype))]
    output, _ = decode_attention(**given, impl="triton")
    truth, _ = decode_attention(**exactly(given), impl="reference")
    torch.testing.assert_close(output.double(), truth, rtol=1e-5, atol=1e-5)


def test_what_has_no_scale_makes_its_row_nan() -> None:
    given = Case([4, 4], {(4, 3): [20, 20]}).inputs()
    (one,) = given["tiers"]
    one.values.scale[int(one.offset[1]) + 7] = torch.nan
    output, lse = decode_attention(**given, impl="triton")
    assert output[:, :2].isfinite().all()
    assert output[:, 2:].isnan().all()
    assert lse.isfinite().all()


def test_every_run_gives_the_same_bits() -> None:
    given = Case([50, 3], {(4, 3): [100, 3], (3, 2): [10, 80]}, dtype=torch.bfloat16).inputs()
    first, again = (decode_attention(**given, impl="triton") for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_tiers_of_several_bases_are_refused() -> None:
    given = Case([4, 4], {(4, 3): [20, 20], (3, 2): [5, 5]}).inputs()
    first, second = given["tiers"]
    given["tiers"] = [first, second._replace(value_basis=None)]
    with pytest.raises(
        UserError, match=r"^impl='triton': decode_attention has no kernel for tiers with more than one val"
    ):
        decode_attention(**given, impl="triton")
    given["tiers"] = [first, second._replace(key_basis=hadamard(64, DEVICE).clone().unsqueeze(0))]
    with pytest.raises(UserError, match=r"for tiers with more than one key_basis, expected impl='reference'$"):
        decode_attention(**given, impl="triton")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts the loads of the interpreter")
def test_a_step_reads_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, scales and zeros once each: with queries and tables at most 5 % more than the kept bytes."""
    import numpy
    from triton.runtime.interpreter import interpreter_builder

    levels = {(8, 8): [500, 64], (4, 3): [900, 700], (3, 2): [0, 1000], (2, 4): [700, 120]}
    given = Case([60, 30], levels, group=2, dim=128, tail=1, dtype=torch.bfloat16).inputs()
    kept = 2 * 2 * 128 * (60 + 30 + 2)
    for keys, values in levels:
        kept += sum(levels[keys, values]) * ((keys + values) * 128 // 8 + 2 * 2 * 2)
    read, load = [], interpreter_builder.create_masked_load

    def count(ptrs: Any, mask: Any, *rest: Any) -> Any:
        read.append(int(numpy.count_nonzero(mask.data)) * (ptrs.get_element_ty().primitive_bitwidth // 8))
        return load(ptrs, mask, *rest)

    monkeypatch.setattr(interpreter_builder, "create_masked_load", count)
    decode_attention(**given, impl="triton")
    assert kept <= sum(read) <= 1.05 * kept


@pytest.mark.gpu
def test_one_graph_serves_a_whole_generation() -> None:
    """Lengths of tiers change between replays; pointers and the grid do not."""
    levels = {(8, 4): [300, 40], (4, 3): [0, 65], (3, 2): [700, 9]}
    given = Case([60, 30], levels, group=4, dim=128, tail=60, capacity=64, dtype=torch.bfloat16).inputs()
    decode_attention(**given, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = decode_attention(**given, impl="triton")
    for used, shorter in ((1, 0), (37, 3), (60, 40)):
        given["tail"].used.fill_(used)
        for one in given["tiers"]:
            one.length.sub_(shorter).clamp_(min=0)
        graph.replay()
        eager = decode_attention(**given, impl="triton")
        assert torch.equal(output, eager[0])
        assert torch.equal(lse, eager[1])
