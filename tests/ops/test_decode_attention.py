"""Ragged decode attention against loops in float64."""

import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention, reference


def in_loops(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offset: Tensor,
    length: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    sees: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H*G, T, D] and log-sum-exp, one query at a time; `sees` [B, T, M]."""
    batch, query_heads, new, dim = query.shape
    heads = tail_keys.shape[1]
    output, lse = torch.zeros(query.shape, dtype=torch.float64), torch.zeros(query.shape[:3], dtype=torch.float64)
    for b in range(batch):
        for h in range(query_heads):
            head = h // (query_heads // heads)
            row = b * heads + head
            own = slice(int(offset[row]), int(offset[row]) + int(length[row]))
            for t in range(new):
                k = torch.cat([keys[own], tail_keys[b, head][sees[b, t]]]).double()
                v = torch.cat([values[own], tail_values[b, head][sees[b, t]]]).double()
                scores = k @ query[b, h, t].double() * scaling
                lse[b, h, t] = scores.logsumexp(0)
                output[b, h, t] = scores.softmax(0) @ v if len(k) else torch.zeros(dim)
    return output, lse


def problem(
    lengths: list[int],
    batch: int,
    heads: int,
    group: int,
    new: int,
    before: int,
    dim: int = 8,
    seed: int = 0,
    gap: int = 3,
) -> tuple[Tensor, ...]:
    """Inputs whose pool is NaN wherever no row lives, with tails of `before` earlier slots and `new` new ones."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    offset, at = [], gap
    for length in lengths:
        offset.append(at)
        at += length + gap
    pools = torch.full((2, at, dim), torch.nan)
    for begin, length in zip(offset, lengths, strict=True):
        pools[:, begin : begin + length] = noise(2, length, dim)
    tail = noise(2, batch, heads, before + new, dim)
    query = noise(batch, heads * group, new, dim) * 2
    return query, *pools, torch.tensor(offset), torch.tensor(lengths), *tail


def causal(batch: int, new: int, tail: int) -> Tensor:
    return torch.ones(batch, new, tail, dtype=torch.bool).tril(tail - new)


def check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    offset: Tensor,
    length: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    mask: Tensor | None = None,
    longest: int | None = None,
) -> None:
    batch, _, new, dim = query.shape
    sees = causal(batch, new, tail_keys.shape[2]) if mask is None else mask[:, 0]
    longest = int(length.max()) if longest is None else longest
    scaling, kept = 1.3 * dim**-0.5, Ragged(keys, values, offset, length, longest)
    told = in_loops(query, keys, values, offset, length, tail_keys, tail_values, sees, scaling)
    for worth_a_call in (0, 40, 4096):  # every row a view; some copied together; all of them, small as they are
        with patch.object(reference, "_WORTH_A_CALL", worth_a_call):
            ours = decode_attention(query, kept, Tail(tail_keys, tail_values, mask), scaling)
        for one, other in zip(ours, told, strict=True):
            torch.testing.assert_close(one, other.float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 7])
@pytest.mark.parametrize(("new", "before"), [(1, 0), (1, 9), (5, 0), (6, 4)])
def test_ragged_rows(group: int, new: int, before: int) -> None:
    check(*problem([5, 0, 33, 1], batch=2, heads=2, group=group, new=new, before=before))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 9),
    st.data(),
)
def test_any_shape(batch: int, heads: int, group: int, new: int, before: int, slack: int, data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(0, 20), min_size=batch * heads, max_size=batch * heads))
    case = problem(lengths, batch, heads, group, new, before, seed=slack)
    check(*case, longest=max(lengths) + slack)


def test_one_dominant_row() -> None:
    check(*problem([1, 1, 500, 1, 0, 1], batch=2, heads=3, group=2, new=2, before=3))


def test_all_rows_empty() -> None:
    check(*problem([0, 0], batch=1, heads=2, group=2, new=3, before=0, gap=0))


def test_rows_may_share_entries() -> None:
    query, keys, values, offset, length, *tail = problem([7, 4, 9, 6], batch=2, heads=2, group=2, new=2, before=1)
    alias = torch.tensor([2, 1, 2, 0])
    check(query, keys, values, offset[alias], length[alias], *tail)


def test_padding_in_the_tail_is_not_seen() -> None:
    case = problem([7, 4, 9, 6], batch=2, heads=2, group=2, new=4, before=3)
    mask = causal(2, 4, 7)
    mask[0, :, 1] = False
    mask[1, :, 5:] = False
    check(*case, mask=mask.unsqueeze(1))
    blind = decode_attention(case[0], Ragged(*case[1:5], 9), Tail(*case[5:], mask.unsqueeze(1)), 0.3)[0]
    for tail in case[5:]:
        tail[0, :, 1] = 1e4
        tail[1, :, 5:] = 1e4
    assert torch.equal(
        decode_attention(case[0], Ragged(*case[1:5], 9), Tail(*case[5:], mask.unsqueeze(1)), 0.3)[0], blind
    )


def test_a_query_that_sees_nothing_gets_zero() -> None:
    case = problem([0, 3], batch=2, heads=1, group=2, new=1, before=2)
    nothing = torch.zeros(2, 1, 1, 3, dtype=torch.bool)
    output, lse = decode_attention(case[0], Ragged(*case[1:5], 3), Tail(*case[5:], nothing), 0.3)
    assert (output[0] == 0).all()
    assert (lse[0] == -math.inf).all()
    check(*case, mask=nothing)


def test_large_scores_do_not_overflow() -> None:
    query, keys, values, *rest = problem([30, 5], batch=1, heads=2, group=2, new=3, before=2)
    check(query * 60, keys, values, *rest)


def test_half_precision_is_as_good_as_its_inputs() -> None:
    case = problem([30, 5, 11, 0], batch=2, heads=2, group=2, new=3, before=2)
    half = [one.bfloat16() if one.is_floating_point() else one for one in case]
    ours, lse = decode_attention(half[0], Ragged(*half[1:5], 30), Tail(*half[5:]), 0.35)
    whole = [one.float() if one.is_floating_point() else one for one in half]
    told = in_loops(*whole, causal(2, 3, 5), 0.35)
    assert ours.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    # Products, weights and outputs are rounded to 8 bits each.
    torch.testing.assert_close(ours.double(), told[0], rtol=0, atol=0.06)
