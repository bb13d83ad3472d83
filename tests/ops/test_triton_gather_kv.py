"""Compaction on the kernel: the same bits as the reference, and not one of them outside of this layer's segments."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import DEVICE, ROUNDING, STORED, assert_within, draw
from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.gather_kv import Rerotation, gather_kv
from learnkv.ops.rotary import Layout
from learnkv.ops.select import select


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([1, 2, 3]),
    layers=st.sampled_from([1, 3]),
    slots=st.sampled_from([1, 65, 700]),
    dim=st.sampled_from([32, 40, 64, 80, 128, 256]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_the_same_bits_as_the_reference(
    heads: int, layers: int, slots: int, dim: int, dtype: torch.dtype, seed: int
) -> None:
    """Of several layers that share a pool; segments of a random length, empty ones too; absent entries are NaN."""
    generator = torch.Generator().manual_seed(seed)
    rows = layers * heads
    length = torch.randint(0, slots + 1, (layers, heads), generator=generator)
    length[torch.rand(layers, heads, generator=generator) < 0.2] = 0
    total = int(length.sum())
    offset = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
    scores = torch.rand(rows, slots, generator=generator)
    index = select(scores, length.flatten(), total, impl="reference")
    held = [draw(heads, slots, dim, seed=seed + at, dtype=dtype) for at in range(2 * layers)]
    absent = torch.ones(rows * slots, dtype=torch.bool).index_fill_(0, index, False).view(layers, heads, slots)
    for at, one in enumerate(held):
        one[absent[at // 2].to(DEVICE)] = torch.nan
    pools = {
        impl: torch.full((2, total, dim), torch.nan, dtype=dtype, device=DEVICE) for impl in ("reference", "triton")
    }
    for layer in range(layers):
        for impl, (keys, values) in pools.items():
            table = (offset[layer].to(DEVICE), length[layer].to(DEVICE))
            out = Ragged(keys, values, *table, slots)
            gather_kv(*held[2 * layer : 2 * layer + 2], index.to(DEVICE), layer * heads, out, impl=impl)
        assert torch.equal(pools["triton"].nan_to_num(nan=7e7), pools["reference"].nan_to_num(nan=7e7))
    assert not pools["triton"].isnan().any()


@pytest.mark.parametrize(
    ("dim", "layout", "dtype"),
    [
        (32, Layout.halves(16), torch.float32),
        (80, Layout.halves(20), torch.float32),
        (128, Layout.halves(64), torch.bfloat16),
        (32, Layout.interleaved(16), torch.float32),
        (80, Layout.interleaved(12, start=56), torch.bfloat16),
    ],
)
def test_rerotated_keys_within_the_error_budget(dim: Any, layout: Any, dtype: Any) -> None:
    """Rows of one layer of a pool that two share, one of them empty; positions up to 100000."""
    slots, length = 300, torch.tensor([[120, 0, 77], [3, 300, 1]])
    offset = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
    index = select(draw(6, slots, seed=0).cpu(), length.flatten(), int(length.sum()), impl="reference").to(DEVICE)
    keys, values = (draw(3, slots, dim, seed=seed, dtype=dtype) for seed in (1, 2))
    positions = (100_000 - 300 * (slots - index % slots)).to(torch.int32)
    frequencies = 10_000.0 ** (-torch.arange(layout.pairs, device=DEVICE) / layout.pairs)
    how = Rerotation(positions, torch.tensor([0, 5, 99_000], device=DEVICE), frequencies, layout)

    def run(impl: str, dtype: torch.dtype) -> Tensor:
        pools = torch.full((2, len(index), dim), torch.nan, dtype=dtype, device=DEVICE)
        table = (offset[1].to(DEVICE), length[1].to(DEVICE))
        gather_kv(keys.to(dtype), values.to(dtype), index, 3, Ragged(*pools, *table, slots), how, impl=impl)
        return pools[:, 197:]

    (got, copied), (truth, wanted) = run("triton", dtype), run("reference", torch.float64)
    assert torch.equal(copied.double(), wanted)
    # Rounding an angle of up to 100000 radians turns a pair of channels by that much of its length.
    angle_error = 2 * 100_000 * ROUNDING[torch.float32]
    assert_within(got, truth, angle_error * keys.double().abs().amax() * 2 + STORED[dtype] * truth.abs())
    assert torch.equal(layout.rest(got).double(), layout.rest(truth))


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    slots, dim = 2**20, 128
    held = torch.arange(17 * slots, device=DEVICE).remainder(251).bfloat16().view(17, slots, 1).expand(-1, -1, dim)
    held = held.contiguous()
    index = torch.tensor([16 * slots + 5, 17 * slots - 1], device=DEVICE)
    offset = torch.zeros(17, dtype=torch.int64, device=DEVICE)
    length = torch.zeros_like(offset)
    length[-1] = 2
    pool = torch.full((2, 2, dim), torch.nan, dtype=torch.bfloat16, device=DEVICE)
    gather_kv(held, held, index, 0, Ragged(*pool, offset, length, 2), impl="triton")
    assert torch.equal(pool, (index % 251).bfloat16().view(1, 2, 1).expand(2, 2, dim))
