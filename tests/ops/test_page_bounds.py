"""Page bounds and page scores against loops, kernels against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import DEVICE, ROUNDING, assert_within, draw, poisoned
from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.page_bounds import empty_bounds, page_bounds, page_scores

IMPLS = ["reference", "triton"]


def in_loops(rows: list[Tensor], page_size: int, pages: int) -> Tensor:
    """Bounds [R, 2, P, D] of rows of keys [n, D]."""
    bounds = empty_bounds(rows[0], len(rows), 2, pages, rows[0].shape[1])
    for row, keys in enumerate(rows):
        for page, part in enumerate(keys.split(page_size) if len(keys) else ()):
            bounds[row, 0, page], bounds[row, 1, page] = part.amin(0), part.amax(0)
    return bounds


def test_empty_bounds_are_inside_out() -> None:
    bounds = empty_bounds(torch.zeros(1), 3, 2, 5, 4)
    assert (bounds[:, 0] == torch.finfo(torch.float32).max).all()
    assert (bounds[:, 1] == -bounds[:, 0]).all()


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3),
    added=st.lists(st.integers(0, 5), max_size=3),
    page_size=st.sampled_from([1, 8, 12, 16, 32]),
    dim=st.sampled_from([32, 40, 128, 256]),
    half=st.booleans(),
    holes=st.booleans(),
)
def test_bounds_grow_with_what_is_read_and_are_those_of_all_entries(
    lengths: list[int], added: list[int], page_size: int, dim: int, half: bool, holes: bool
) -> None:
    """Segments of a pool first, then a few keys at a time from buffers where they may lie apart; all else is NaN."""
    dtype = torch.bfloat16 if half else torch.float32
    rows = [draw(count + sum(added), dim, seed=row, dtype=dtype) for row, count in enumerate(lengths)]
    pages = -(-(max(lengths) + sum(added)) // page_size) + 1
    length = torch.tensor(lengths)
    offset = length.cumsum(0) - length + 2 * torch.arange(1, len(rows) + 1)
    pool = torch.full((sum(lengths) + 2 * len(rows) + 2, dim), torch.nan, dtype=dtype, device=DEVICE)
    for at, count, keys in zip(offset.tolist(), lengths, rows, strict=True):
        pool[at : at + count] = keys[:count]
    for impl in IMPLS:
        bounds = empty_bounds(rows[0], len(rows), 2, pages, dim)
        table = [one.to(DEVICE) for one in (offset, length)]
        page_bounds(Ragged(pool, pool, *table, max(lengths)), torch.zeros_like(table[1]), bounds, page_size, impl=impl)
        first = length.clone()
        for count in added:
            apart = 2 if holes else 1
            buffer = torch.full((len(rows), count * apart, dim), torch.nan, dtype=dtype, device=DEVICE)
            slots = (torch.arange(count) * apart).expand(len(rows), count).contiguous().to(DEVICE)
            for row, keys in enumerate(rows):
                buffer[row, ::apart] = keys[first[row] : first[row] + count]
            places = (torch.arange(len(rows), device=DEVICE) * count * apart, torch.full_like(table[1], count))
            how = {"slots": slots if holes else None, "impl": impl}
            entries = Ragged(buffer.view(-1, dim), buffer.view(-1, dim), *places, count)
            page_bounds(entries, first.to(DEVICE), bounds, page_size, **how)
            first += count
        assert torch.equal(bounds, in_loops(rows, page_size, pages))


@pytest.mark.parametrize("impl", IMPLS)
def test_entries_that_begin_within_a_page_touch_one_page_more(impl: str) -> None:
    keys = draw(35, 32, seed=0)
    bounds, one = empty_bounds(keys, 1, 2, 9, 32), torch.ones(1, dtype=torch.long, device=DEVICE)
    page_bounds(Ragged(keys, keys, 0 * one, 3 * one, 3), 0 * one, bounds, 4, impl=impl)
    page_bounds(Ragged(keys, keys, 3 * one, 32 * one, 32), 3 * one, bounds, 4, impl=impl)
    assert torch.equal(bounds, in_loops([keys], 4, 9))


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_of_one_page_by_hand(impl: str) -> None:
    low, high = torch.tensor([[-1.0, 0.5, 2.0]]), torch.tensor([[3.0, 0.5, 4.0]])
    bounds = torch.stack([torch.stack([low, high])]).to(DEVICE)
    query = torch.tensor([[[2.0, -1.0, 0.0], [-2.0, 3.0, -1.0]]], device=DEVICE)
    pages = torch.tensor([1], device=DEVICE)
    assert page_scores(query, bounds, pages, impl=impl).tolist() == [[5.5], [1.5]]
    for how, told in {"max": 5.5, "mean": 3.5, "sum": 7.0}.items():
        assert page_scores(query, bounds, pages, how, impl=impl).tolist() == [[told]]


@pytest.mark.parametrize(
    ("batch", "heads", "group", "dim", "dtype", "reduce"),
    [
        (1, 2, 1, 32, torch.float32, "none"),
        (2, 1, 2, 64, torch.float32, "max"),
        (1, 2, 4, 128, torch.bfloat16, "mean"),
        (3, 1, 7, 80, torch.float32, "none"),
        (1, 1, 8, 256, torch.bfloat16, "sum"),
    ],
)
def test_scores_within_the_error_budget(
    batch: int, heads: int, group: int, dim: int, dtype: torch.dtype, reduce: str
) -> None:
    """Pages without entries are inside out or NaN, and -inf; a row may have none at all."""
    count, rows = 70, batch * heads
    query = draw(batch, heads * group, dim, seed=0, dtype=dtype)
    bounds = draw(rows, 2, count, dim, seed=1, dtype=dtype).sort(1).values
    pages = torch.tensor([70, 0, 33][:rows], device=DEVICE)
    beyond = torch.arange(count, device=DEVICE) >= pages.unsqueeze(-1)
    bounds[beyond[:, None].expand(rows, 2, count)] = torch.nan
    with poisoned():
        got = page_scores(query, bounds, pages, reduce, impl="triton")
    bounds = bounds.double().nan_to_num()
    truth = page_scores(query.double(), bounds, pages, reduce, impl="reference")
    sizes = page_scores(query.double().abs(), bounds.abs().amax(1, True).expand_as(bounds), pages, reduce)
    assert got.shape == truth.shape
    assert got.dtype == torch.float32
    there = truth > -torch.inf
    assert there.sum() == pages.sum() * (group if reduce == "none" else 1)
    assert (got[~there] == -torch.inf).all()
    assert_within(got[there], truth[there], (dim**0.5 + group) * ROUNDING[torch.float32] * sizes[there])


def test_no_key_within_the_bounds_scores_higher() -> None:
    keys, query = draw(64, 32, seed=0), draw(1, 1, 32, seed=1)
    bounds = in_loops([keys], 16, 4)
    scores = page_scores(query, bounds, torch.tensor([4], device=DEVICE))
    assert (scores[0] >= (keys @ query[0, 0]).view(4, 16).amax(1)).all()
