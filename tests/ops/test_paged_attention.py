"""Attention that reads listed pages only, against loops in float64, on the reference and on the kernel."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.arguments import call
from support.kernels import DEVICE, ROUNDING, STORED, assert_within, capped_with_sinks, draw, poisoned
from torch import Tensor

from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.softmax_terms import NO_TERMS


def problem(
    lengths: list[int],
    heads: int,
    group: int,
    dim: int,
    tail: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    per_query: bool = False,
    padded: bool = False,
    spare: int = 0,
    capped: bool = False,
) -> dict[str, Any]:
    """Inputs of one token per row; what no row owns is NaN, and so are `spare` slots behind the tail."""
    batch, generator = len(lengths) // heads, torch.Generator().manual_seed(sum(lengths))
    length = torch.tensor(lengths)
    offset = length.cumsum(0) - length + 3 * torch.arange(1, len(lengths) + 1)
    pools = torch.full((2, sum(lengths) + 3 * len(lengths) + 3, dim), torch.nan, dtype=dtype, device=DEVICE)
    for at, count in zip(offset.tolist(), lengths, strict=True):
        pools[:, at : at + count] = draw(2, count, dim, seed=at, dtype=dtype)
    tails = torch.full((2, batch, heads, tail + spare, dim), torch.nan, dtype=dtype, device=DEVICE)
    tails[:, :, :, :tail] = draw(2, batch, heads, tail, dim, seed=1, dtype=dtype)
    seen = torch.rand(batch, tail + spare, generator=generator) > 0.3 if padded else torch.ones(batch, tail + spare) > 0
    seen[:, tail - 1] = True
    most = -(-(max(lengths) + tail) // page_size)
    pages = torch.full((batch * heads * (group if per_query else 1), most), -1, dtype=torch.int32)
    for at, listed in enumerate(pages):
        row = at // (group if per_query else 1)
        entries = lengths[row] + int(seen[row // heads, :tail].sum())
        held = torch.arange(-(-entries // page_size))
        some = held[torch.rand(len(held), generator=generator) < 0.6]
        listed[: len(some)] = some  # of some rows nothing is read
    return {
        "query": draw(batch, heads * group, 1, dim, seed=2, dtype=dtype),
        "kept_keys": pools[0],
        "kept_values": pools[1],
        "offset": offset.to(DEVICE),
        "length": length.to(DEVICE),
        "longest": max(lengths),
        "tail_keys": tails[0],
        "tail_values": tails[1],
        "tail_mask": seen[:, None, None].to(DEVICE) if padded else None,
        "scaling": 1.5 * dim**-0.5,
        "tail_used": torch.tensor([tail], device=DEVICE) if spare else None,
        "pages": pages.to(DEVICE),
        "page_size": page_size,
        "terms": capped_with_sinks(heads * group) if capped else NO_TERMS,
    }


def in_loops(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and the output for values of the same sizes, all positive; float64."""
    query, pages, page_size = given["query"].double(), given["pages"].cpu(), given["page_size"]
    terms = given["terms"]
    batch, query_heads, _, _ = query.shape
    heads = given["tail_keys"].shape[1]
    used = given["tail_keys"].shape[2] if given["tail_used"] is None else int(given["tail_used"])
    output, sizes = torch.zeros_like(query), torch.zeros_like(query)
    lse = torch.full(query.shape[:3], -torch.inf, dtype=torch.float64, device=DEVICE)
    for b in range(batch):
        for h in range(query_heads):
            head = h // (query_heads // heads)
            at = int(given["offset"][b * heads + head])
            own = slice(at, at + int(given["length"][b * heads + head]))
            seen = slice(used) if given["tail_mask"] is None else given["tail_mask"][b, 0, 0, :used]
            k = torch.cat([given["kept_keys"][own], given["tail_keys"][b, head, :used][seen]]).double()
            v = torch.cat([given["kept_values"][own], given["tail_values"][b, head, :used][seen]]).double()
            row = (b * query_heads + h) * len(pages) // (batch * query_heads)
            listed = [page for page in pages[row].tolist() if page >= 0]
            read = [i for page in listed for i in range(page * page_size, (page + 1) * page_size) if i < len(k)]
            k, v = k[read], v[read]
            scores = terms.capped(k @ query[b, h, 0] * given["scaling"])
            if terms.sinks is not None:  # one more entry of every list, whose value is 0
                scores = torch.cat([scores, terms.sinks[h : h + 1].double()])
                v = torch.cat([v, torch.zeros_like(query[b, h])])
            if len(scores):
                lse[b, h, 0] = scores.logsumexp(0)
                output[b, h, 0] = scores.softmax(0) @ v
                sizes[b, h, 0] = scores.softmax(0) @ v.abs()
    return output, lse, sizes


def check(given: dict[str, Any], impl: str) -> None:
    with poisoned():
        output, lse = call(decode_attention, given, impl=impl)
    truth, log_mass, sizes = in_loops(given)
    unit, dtype = ROUNDING[torch.float32], given["query"].dtype
    keys = torch.cat([given[name].nan_to_num().flatten(0, -2) for name in ("kept_keys", "tail_keys")]).double()
    largest = given["scaling"] * float(given["query"].double().norm(dim=-1).max() * keys.norm(dim=-1).max())
    score_error = 4 * unit * largest
    sums = (given["pages"].shape[1] * given["page_size"]) ** 0.5 * unit + 16 * unit
    relative = 2 * score_error + sums
    if dtype == torch.bfloat16:
        relative += 2 * ROUNDING[dtype]  # weights are rounded before they meet the values
    assert output.dtype == dtype
    assert lse.dtype == torch.float32
    assert_within(output, truth, relative * sizes + STORED[dtype] * truth.abs())
    assert_within(lse, log_mass, score_error + sums + unit * log_mass.abs())


CASES = {
    "one row": {"lengths": [100], "heads": 1, "group": 1, "dim": 32, "tail": 1, "page_size": 16},
    "pages across segment and tail": {
        "lengths": [37, 0, 201, 64],
        "heads": 2,
        "group": 4,
        "dim": 64,
        "tail": 45,
        "page_size": 16,
    },
    "a list for every query head": {
        "lengths": [130, 33],
        "heads": 1,
        "group": 7,
        "dim": 80,
        "tail": 9,
        "page_size": 8,
        "per_query": True,
    },
    "padding in the tail": {
        "lengths": [70, 5, 0],
        "heads": 1,
        "group": 2,
        "dim": 32,
        "tail": 40,
        "page_size": 32,
        "padded": True,
    },
    "a tail of fixed capacity, padded": {
        **{"lengths": [20, 90], "heads": 2, "group": 2, "dim": 128, "tail": 21, "page_size": 12},
        **{"padded": True, "spare": 11, "per_query": True},
    },
    "a tail of fixed capacity": {
        "lengths": [20, 90],
        "heads": 2,
        "group": 2,
        "dim": 32,
        "tail": 21,
        "page_size": 5,
        "spare": 11,
    },
    "soft cap and sinks": {
        **{"lengths": [37, 0, 70, 64], "heads": 2, "group": 2, "dim": 32, "tail": 3, "page_size": 16},
        **{"padded": True, "capped": True},
    },
    "soft cap and sinks, a list for every query head": {
        **{"lengths": [37, 0], "heads": 1, "group": 4, "dim": 32, "tail": 3, "page_size": 16},
        **{"per_query": True, "capped": True},
    },
    "largest head": {"lengths": [65, 300], "heads": 2, "group": 8, "dim": 256, "tail": 3, "page_size": 16},
}


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_against_loops(case: dict[str, int | list[int]], impl: str) -> None:
    check(problem(**case), impl)


@pytest.mark.parametrize("name", ["pages across segment and tail", "a tail of fixed capacity, padded"])
def test_bfloat16_on_the_kernel(name: str) -> None:
    check(problem(**CASES[name], dtype=torch.bfloat16), "triton")


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=2, max_size=2),
    tail=st.integers(1, 40),
    page_size=st.integers(1, 20),
    padded=st.booleans(),
    per_query=st.booleans(),
)
def test_any_shape_on_the_reference(
    lengths: list[int], tail: int, page_size: int, padded: bool, per_query: bool
) -> None:
    check(problem(lengths, 1, 2, 8, tail, page_size, padded=padded, per_query=per_query), "reference")


def test_all_pages_are_everything() -> None:
    given = problem([37, 0, 201, 64], 2, 2, 32, 9, 16)
    given["pages"] = torch.arange(14, dtype=torch.int32, device=DEVICE).repeat(4, 1)
    whole = {name: held for name, held in given.items() if not name.startswith("page")}
    for ours, theirs in zip(call(decode_attention, given), call(decode_attention, whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
