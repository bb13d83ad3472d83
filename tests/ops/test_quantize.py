"""Codes: packed exactly, decoded within the error that scale and zero allow, NaN where there is none."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.hadamard import hadamard
from learnkv.ops.quantize import BITS, Grid, dequantize, pack, packed_bytes, quantize, quantize_entries, unpack

INTEGER_GRIDS: list[Grid] = ["zero_point", "zero_in_range", "symmetric"]


@given(st.integers(1, 8), st.integers(0, 70), st.integers(0, 5), st.integers(0, 2**31))
def test_codes_come_back_from_bytes_without_gaps(bits: int, count: int, rows: int, seed: int) -> None:
    codes = torch.randint(0, 2**bits, (rows, count), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, math.ceil(count * bits / 8))
    assert packed.shape[1] == packed_bytes(count, bits)
    assert torch.equal(unpack(packed, bits, count), codes)


def test_three_bits_cross_bytes_from_the_lowest_bit_on() -> None:
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8)
    number = sum(int(code) << 3 * place for place, code in enumerate(codes))
    assert pack(codes, 3).tolist() == list(number.to_bytes(3, "little"))


@st.composite
def groups(draw: Callable[..., Any]) -> Tensor:
    """[T, 2 * g] of any magnitude that float16 scales hold, constant groups, outliers and an offset included."""
    width = draw(st.sampled_from([2, 8, 64]))
    shape = (draw(st.integers(0, 4)), width)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    vectors = torch.randn(shape, generator=generator) * 10 ** draw(st.floats(-9, 3)) + draw(
        st.sampled_from([0, 0.1, -300])
    )
    kind = draw(st.sampled_from(["plain", "constant", "zero", "outlier"]))
    if kind == "constant":
        vectors = vectors[:, :1].expand(shape).clone()
    elif kind == "zero":
        vectors = torch.zeros(shape)
    elif kind == "outlier":
        vectors[:, 0] = draw(st.sampled_from([3e4, -6e4]))
    return vectors.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])))


def rounding(exact: Tensor, stored: torch.dtype) -> Tensor:
    """Largest error of a number that is rounded to `stored`, subnormal numbers included."""
    limits = torch.finfo(stored)
    return exact.abs() * limits.eps / 2 + limits.smallest_normal * limits.eps


@given(groups(), st.sampled_from(BITS), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_the_error_is_half_a_step_and_what_scale_and_zero_lose(
    vectors: Tensor, bits: int, scale_dtype: torch.dtype
) -> None:
    before, group = vectors.clone(), vectors.shape[1] // 2
    made = quantize(vectors, bits, group, scale_dtype=scale_dtype)
    assert torch.equal(vectors, before)
    assert made.scale.dtype == scale_dtype
    assert made.codes.shape == (len(vectors), packed_bytes(vectors.shape[1], bits))
    grouped = vectors.float().unflatten(1, (2, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    exact = (high - low) / (2**bits - 1)
    bound = made.scale.float() / 2 + (2**bits - 1) * rounding(exact, scale_dtype) + rounding(low, scale_dtype)
    bound = bound + 2**-22 * torch.maximum(low.abs(), high.abs())  # float32 arithmetic
    error = (dequantize(made, bits, vectors.shape[1]).unflatten(1, (2, group)) - grouped).abs()
    assert (error <= bound.unsqueeze(-1)).all()


@given(groups(), st.sampled_from(BITS), st.sampled_from(INTEGER_GRIDS))
def test_grids_with_a_code_for_zero_err_by_one_step(vectors: Tensor, bits: int, grid: Grid) -> None:
    """Rounding the zero to an integer and the scale to float16 may each clip an end of the range."""
    made = quantize(vectors, bits, grid=grid)
    exact = vectors.float()
    error = (dequantize(made, bits, vectors.shape[1], grid) - exact).abs()
    step = (
        made.scale.float() * (1 + (2**bits - 1) * 2**-10)
        + exact.abs().amax(-1, keepdim=True) * 2**-9
        + 2**bits * 2**-24
    )
    assert (error <= step).all()


@pytest.mark.parametrize("grid", ["offset", *INTEGER_GRIDS])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e9])
def test_a_group_without_a_scale_is_nan_and_leaves_others_alone(grid: Grid, bad: float) -> None:
    vectors = torch.linspace(-1, 1, 16).repeat(2, 1)
    alone = dequantize(quantize(vectors, 8, 8, grid), 8, 16, grid)
    vectors[0, 3] = bad
    decoded = dequantize(quantize(vectors, 8, 8, grid), 8, 16, grid)
    assert decoded[0, :8].isnan().all()
    assert torch.equal(decoded[0, 8:], alone[0, 8:])
    assert torch.equal(decoded[1], alone[1])


def test_constant_groups_are_exact() -> None:
    vectors = torch.tensor([0.0, 1.5, -2.0]).unsqueeze(1).expand(3, 8)
    for bits in BITS:
        assert torch.equal(dequantize(quantize(vectors, bits), bits, 8), vectors)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 5}, r"^bits=5: expected one of 2, 3, 4, 8$"),
        ({"bits": 4, "group": 3}, r"^group=3: expected a divisor of the 8 numbers that share codes$"),
        ({"bits": 4, "group": 0}, r"^group=0: "),
        ({"bits": 4, "grid": "log"}, r"^grid='log': expected one of offset, "),
        ({"bits": 4, "grid": "symmetric", "impl": "triton"}, r"^impl='triton': quantize has no kernel for grid='symm"),
        (
            {"bits": 4, "group": 4, "impl": "triton"},
            r"^impl='triton': quantize has no kernel for 2 groups per vector, ",
        ),
    ],
)
def test_what_codes_do_not_have_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantize(torch.zeros(1, 8), **arguments)


def test_entries_without_a_rotation_are_refused() -> None:
    source, index = torch.zeros(1, 3, 80), torch.tensor([1])
    with pytest.raises(UserError, match=r"^rotation=hadamard: 80 channels have no Hadamard matrix here, "):
        quantize_entries(source, index, 4, rotation="hadamard")
    with pytest.raises(UserError, match=r"^rotation='random': expected one of none, hadamard$"):
        quantize_entries(source, index, 4, rotation="random")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^bits=5: "):
        quantize_entries(source, index, 5)


def test_entries_are_gathered_and_rotated_before_they_are_rounded() -> None:
    source, index = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([38, 36, 53])
    made = quantize_entries(source, index, 3, first_row=4, rotation="hadamard")
    wanted = quantize(source.view(18, 16)[index - 36] @ hadamard(16), 3)
    for one, other in zip(made, wanted, strict=True):
        assert torch.equal(one, other)


def test_codes_of_more_than_a_byte_are_refused() -> None:
    with pytest.raises(UserError, match=r"^bits=9: expected 1 to 8$"):
        pack(torch.zeros(1, 8, dtype=torch.uint8), 9)
    with pytest.raises(UserError, match=r"^bits=0: "):
        unpack(torch.zeros(1, 8, dtype=torch.uint8), 0, 1)
