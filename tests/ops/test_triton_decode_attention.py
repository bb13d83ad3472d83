"""The decode kernel against the reference in float64, within an error budget worked out from the inputs."""

import dataclasses
from typing import Any

import pytest
import torch
from support.arguments import call
from support.kernels import DEVICE, ROUNDING, STORED, assert_within, capped_with_sinks, draw, poisoned
from torch import Tensor

from learnkv.ops.decode_attention import decode_attention

SPARE = 9  # NaN entries around and between the segments, NaN slots behind the tail


@dataclasses.dataclass
class Case:
    """One call; `lengths` are kept entries of the rows, B * heads of them."""

    lengths: list[int]
    heads: int = 2
    group: int = 4
    dim: int = 64
    new: int = 1
    tail: int = 5
    dtype: torch.dtype = torch.float32
    masked: bool = False
    capacity: int | None = None
    """Slots of the tail that are handed over, where tail_used says how many are in use."""
    capped: bool = False
    """With a soft cap and sinks."""
    shared: bool = False
    """All batch rows read the segments of the first."""

    def inputs(self) -> dict[str, Any]:
        rows = len(self.lengths)
        batch = rows // self.heads
        length = torch.tensor(self.lengths)
        offset = length.cumsum(0) - length + SPARE * torch.arange(1, rows + 1)
        if self.shared:
            offset, length = (table[: self.heads].repeat(batch) for table in (offset, length))
        pools, tails = [], []
        for seed in (1, 2):
            pool = torch.full((sum(self.lengths) + SPARE * (rows + 1), self.dim), torch.nan, dtype=self.dtype)
            for row, (at, count) in enumerate(zip(offset.tolist(), length.tolist(), strict=True)):
                # Later keys are longer, so that the running maximum keeps moving.
                size = torch.linspace(0.5, 1.5, count).unsqueeze(-1)
                pool[at : at + count] = draw(count, self.dim, seed=10 * row + seed).cpu() * size
            pools.append(pool.to(DEVICE))
            slots = torch.full((batch, self.heads, (self.capacity or self.tail) + SPARE, self.dim), torch.nan)
            slots = slots.to(DEVICE, self.dtype)
            slots[:, :, : self.tail] = draw(batch, self.heads, self.tail, self.dim, seed=seed, dtype=self.dtype)
            tails.append(slots[:, :, : self.capacity or self.tail])
        # A transposed view, as models make them.
        query = draw(batch, self.new, self.heads * self.group, self.dim, seed=3, dtype=self.dtype).transpose(1, 2)
        mask = None
        if self.masked:
            handed = self.capacity or self.tail
            mask = draw(batch, 1, self.new, handed, seed=4) > -0.5
            mask[0, 0, 0] = False  # this query sees its segment alone, and nothing at all where that is empty
        return {
            "query": query,
            "kept_keys": pools[0],
            "kept_values": pools[1],
            "offset": offset.to(DEVICE),
            "length": length.to(DEVICE),
            "longest": int(length.max()),
            "tail_keys": tails[0],
            "tail_values": tails[1],
            "tail_mask": mask,
            "scaling": 1.5 * self.dim**-0.5,
            "tail_used": None if self.capacity is None else torch.tensor([self.tail], device=DEVICE),
            **({"terms": capped_with_sinks(self.heads * self.group)} if self.capped else {}),
        }


def check(case: Case) -> None:
    given = case.inputs()
    with poisoned():
        output, lse = call(decode_attention, given, impl="triton")
    exact = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}
    truth, log_mass = call(decode_attention, exact, impl="reference")
    sizes = {name: exact[name].nan_to_num().abs() for name in ("kept_values", "tail_values")}
    weighed, _ = call(decode_attention, exact | sizes, impl="reference")

    # The partial sums of a score grow no faster than the product of the norms; a few roundings of that size, the scale,
    # and the argument of exp2. Then exp2 and sums over all entries.
    unit = ROUNDING[torch.float32]
    keys = torch.cat([exact[name].nan_to_num().flatten(0, -2) for name in ("kept_keys", "tail_keys")])
    largest = exact["scaling"] * float(exact["query"].norm(dim=-1).max() * keys.norm(dim=-1).max())
    score_error = 4 * unit * largest
    sums = ((exact["longest"] + case.tail) ** 0.5 + 16) * unit
    relative = 2 * score_error + sums
    if case.dtype == torch.bfloat16:
        relative += 2 * ROUNDING[case.dtype]  # weights are rounded before they meet the values
    assert output.dtype == case.dtype
    assert lse.dtype == torch.float32
    assert_within(output, truth, relative * weighed + STORED[case.dtype] * truth.abs())
    assert_within(lse, log_mass, score_error + sums + unit * lse.abs())


CASES = {
    "one row of one query head": Case([70], heads=1, group=1, dim=32),
    "group of 2, a head without entries": Case([130, 0, 1, 64], group=2, dim=128),
    "group of 4, a dominating head, three rows of a batch": Case([1, 1, 900, 3, 0, 65], group=4, dim=64),
    "group of 7, odd head size": Case([33, 200], group=7, dim=80),
    "group of 8, largest head size": Case([100, 31], group=8, dim=256),
    "head size 96, bfloat16": Case([129, 7], group=2, dim=96, dtype=torch.bfloat16),
    "bfloat16, group of 7, masked": Case([300, 64, 5, 0], group=7, dim=128, dtype=torch.bfloat16, masked=True),
    "several tokens, causal": Case([65, 3], group=2, dim=40, new=3, tail=70),
    "several tokens, masked, more than a tile": Case([20, 150], heads=1, group=4, dim=32, new=6, masked=True, tail=6),
    "a tail of fixed capacity": Case([90, 0], group=4, dim=64, new=2, tail=66, capacity=200),
    "a tail of fixed capacity, masked": Case([90, 0], group=4, tail=3, capacity=64, masked=True),
    "beams that share a segment": Case([80, 5, 0, 0, 0, 0], group=2, shared=True, dtype=torch.bfloat16),
    "nothing kept at all": Case([0, 0], group=1, dim=32, masked=True),
    "soft cap and sinks, rows split over programs": Case([700, 0, 3, 64], group=4, capped=True),
    "soft cap and sinks, nothing kept, masked": Case([0, 0], group=2, dim=32, masked=True, capped=True),
    "soft cap and sinks, several tokens, bfloat16": Case(
        [65], heads=1, group=7, new=3, dtype=torch.bfloat16, capped=True
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_the_truth(case: Case) -> None:
    check(case)


def test_a_tile_of_queries_per_program() -> None:
    """So many queries that every tile has one program, which then reads all rows and leaves nothing to merge."""
    check(Case([70, 10], heads=2, group=4, dim=32, new=70, tail=70))


def test_the_sink_joins_once_whatever_the_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of one program, and one of 23."""
    for count in (1, 12):
        monkeypatch.setattr("learnkv.ops.decode_attention.triton.processors", lambda device, n=count: n)
        check(Case([700], heads=1, group=2, dim=32, capped=True))


def test_more_parts_than_are_merged_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """23 programs for one row; a merge takes 16 parts at a time."""
    monkeypatch.setattr("learnkv.ops.decode_attention.triton.processors", lambda device: 12)
    check(Case([1400], heads=1, group=2, dim=32))


def test_segments_without_a_single_entry_and_an_empty_pool() -> None:
    given = Case([0, 0], group=2, dim=32).inputs()
    given |= {name: given[name][:0] for name in ("kept_keys", "kept_values")}
    output, lse = call(decode_attention, given, impl="triton")
    seen = given["tail_values"]
    weight = (given["query"] @ given["tail_keys"].repeat_interleave(2, 1).transpose(-1, -2)) * given["scaling"]
    torch.testing.assert_close(lse, weight.logsumexp(-1))
    torch.testing.assert_close(output, weight.softmax(-1) @ seen.repeat_interleave(2, 1))


def test_every_run_gives_the_same_bits() -> None:
    given = Case([500, 3, 64, 129], group=4, dim=64, dtype=torch.bfloat16).inputs()
    first, again = (call(decode_attention, given, impl="triton") for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts the steps of the interpreter")
@pytest.mark.parametrize("lengths", [[1100, 0, 0, 20], [280, 280, 280, 280]])
def test_the_longest_row_decides_nothing(lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every program reads the same number of blocks, whether one head dominates or all are equal."""
    from triton.runtime.interpreter import interpreter_builder

    blocks: dict[int, int] = {}
    dot = interpreter_builder.create_dot

    def count(*args: Any) -> Any:
        program = interpreter_builder.grid_idx[0]
        blocks[program] = blocks.get(program, 0) + 1
        return dot(*args)

    monkeypatch.setattr(interpreter_builder, "create_dot", count)
    call(decode_attention, Case(lengths, dim=32).inputs(), impl="triton")
    total = sum(-(-count // 64) for count in lengths) + len(lengths)
    share = -(-total // 4)
    assert len(blocks) == 4
    assert sum(blocks.values()) == 2 * total
    assert max(blocks.values()) == 2 * share


@pytest.mark.gpu
def test_one_graph_serves_a_whole_generation() -> None:
    """Lengths and the tail's length change between replays; pointers and the grid do not."""
    case = Case([300, 40, 0, 65], group=4, dim=128, tail=60, capacity=64, dtype=torch.bfloat16)
    given = case.inputs()
    call(decode_attention, given, impl="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, lse = call(decode_attention, given, impl="triton")
    for used, shorter in ((1, 0), (37, 3), (60, 40)):
        given["tail_used"].fill_(used)
        given["length"].sub_(shorter).clamp_(min=0)
        graph.replay()
        eager = call(decode_attention, given, impl="triton")
        assert torch.equal(output, eager[0])
        assert torch.equal(lse, eager[1])
