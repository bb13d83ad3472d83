"""Compaction against indexing row by row."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.gather_kv import Rerotation, gather_kv
from learnkv.ops.rotary import Layout


@st.composite
def budgets(draw: Callable[..., Any]) -> tuple[int, int, int, list[int]]:
    """Entries kept by R rows of L layers, out of S slots; one row may have them all."""
    layers, rows, slots = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 9))
    count = st.one_of(st.just(0), st.just(slots), st.integers(0, slots))
    return layers, rows, slots, draw(st.lists(count, min_size=layers * rows, max_size=layers * rows))


@settings(max_examples=80, deadline=None)
@given(budgets(), st.booleans())
def test_each_row_is_written_to_its_own_segment_and_nothing_else(
    problem: tuple[int, int, int, list[int]], strided: bool
) -> None:
    layers, rows, slots, counts = problem
    generator = torch.Generator().manual_seed(sum(counts))
    chosen = [torch.randperm(slots, generator=generator)[:count].sort().values for count in counts]
    index = torch.cat([row * slots + slot for row, slot in enumerate(chosen)])
    length = torch.tensor(counts).view(layers, rows)
    offset = (length.flatten().cumsum(0) - length.flatten()).view(layers, rows)
    keys, values = torch.randn(2, layers, rows, slots, 3, generator=generator)
    if strided:
        keys = keys.transpose(2, 3).contiguous().transpose(2, 3)
    pools = torch.full((2, len(index), 3), torch.nan)
    for layer in range(layers):
        left = pools.clone()
        before, after = int(offset[layer, 0]), int(offset[layer, -1] + length[layer, -1])
        out = Ragged(*pools, offset[layer], length[layer], slots)
        gather_kv(keys[layer], values[layer], index, layer * rows, out)
        for pool, old in zip(pools, left, strict=True):
            assert torch.equal(pool[:before], old[:before])
            assert pool[after:].isnan().all()
    for row, slot in enumerate(chosen):
        at = slice(int(offset.flatten()[row]), int(offset.flatten()[row]) + counts[row])
        assert torch.equal(pools[0, at], keys.flatten(0, 1)[row][slot])
        assert torch.equal(pools[1, at], values.flatten(0, 1)[row][slot])


@pytest.mark.parametrize("channels", [6, 4])
@pytest.mark.parametrize("align", ["first", "last"])
def test_rerotated_keys_are_those_of_the_new_positions(channels: int, align: str) -> None:
    """Channels behind the first `channels` are not rotated. Aligned to the last, a row ends where the prompt does."""
    slots, padding, dim = 40, 3, 6
    generator = torch.Generator().manual_seed(0)
    plain, values = torch.randn(2, 4, slots, dim, generator=generator, dtype=torch.float64)
    frequencies = 0.5 ** torch.arange(channels // 2)

    def rotated(keys: Tensor, positions: Tensor) -> Tensor:
        turn = torch.polar(torch.ones(()).double(), positions.unsqueeze(-1) * frequencies.double())
        pairs = torch.complex(keys[..., : channels // 2], keys[..., channels // 2 : channels]) * turn
        return torch.cat([pairs.real, pairs.imag, keys[..., channels:]], -1)

    chosen = [torch.tensor(kept).long() for kept in ([3, 9, 10, 39], [], [7], list(range(3, 40, 5)))]
    length = torch.tensor([len(kept) for kept in chosen])
    offset = length.cumsum(0) - length
    index = torch.cat([row * slots + kept for row, kept in enumerate(chosen)])
    last = slots - padding
    first = torch.zeros(4, dtype=torch.long) if align == "first" else last - length
    keys = rotated(plain, torch.arange(slots) - padding)
    pools = torch.full((2, len(index), dim), torch.nan, dtype=torch.float64)
    how = Rerotation((index % slots - padding).to(torch.int32), first, frequencies, Layout.halves(channels // 2))
    gather_kv(keys, values, index, 0, Ragged(*pools, offset, length, slots), how)
    for row, kept in enumerate(chosen):
        at = slice(int(offset[row]), int(offset[row]) + len(kept))
        wanted = rotated(plain[row, kept], int(first[row]) + torch.arange(len(kept)))
        torch.testing.assert_close(pools[0, at], wanted, rtol=0, atol=1e-12)
        assert torch.equal(pools[1, at], values[row, kept])
