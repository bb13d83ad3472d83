"""The kernels that quantise, pack and decode: the bits of the reference, and nothing written beside them."""

import math

import pytest
import torch
from support.kernels import DEVICE, draw, poisoned
from torch import Tensor

from learnkv.errors import UserError
from learnkv.ops.dispatch import Impl
from learnkv.ops.hadamard import hadamard
from learnkv.ops.quantize import BITS, Quantized, dequantize, empty, quantize, quantize_entries

SCALES = (torch.float16, torch.bfloat16, torch.float32)
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of NaN and infinities


def awkward(dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[37, dim]: magnitudes of 1e-9 to 1e3, constant and empty ranges, outliers, NaN, and what no scale holds."""
    vectors = draw(37, dim, seed=dim) * torch.logspace(-9, 3, 37, device=DEVICE).unsqueeze(1)
    vectors += torch.tensor([0, 0.1, -300.0], device=DEVICE).repeat(13)[:37].unsqueeze(1)
    vectors[1], vectors[2], vectors[6], vectors[7] = 1.5, 0, 1e9, -1e9
    for row, number in ((3, math.nan), (4, math.inf), (5, -math.inf), (8, 3e4), (9, 1e9)):
        vectors[row, row % dim] = number
    return vectors.to(dtype)


def assert_same(got: Quantized, wanted: Quantized) -> None:
    """Bit for bit, NaN where there is NaN."""
    for one, other in zip(got, wanted, strict=True):
        assert one is not None
        assert other is not None
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale_dtype", SCALES)
@pytest.mark.parametrize("dim", [64, 20])
def test_the_same_bits_as_the_reference(bits: int, scale_dtype: torch.dtype, dim: int) -> None:
    """20 codes of 3 bits end within a byte."""
    vectors = awkward(dim)
    before = vectors.clone()
    with poisoned():
        made = quantize(vectors, bits, scale_dtype=scale_dtype, impl="triton")
    assert_same(made, quantize(vectors, bits, scale_dtype=scale_dtype, impl="reference"))
    torch.testing.assert_close(vectors, before, rtol=0, atol=0, equal_nan=True)
    with poisoned():
        decoded = dequantize(made, bits, dim, impl="triton")
    wanted = dequantize(made, bits, dim, impl="reference")
    torch.testing.assert_close(decoded, wanted, rtol=0 if DEVICE.type == "cpu" else 2**-20, atol=0, equal_nan=True)


@pytest.mark.parametrize("dim", [8, 80, 96, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_head_sizes(bits: int, dim: int) -> None:
    """Vectors that are a whole number of words, and others; of several leading dimensions."""
    vectors = awkward(dim, torch.bfloat16)[:18].view(2, 9, dim)
    made = quantize(vectors, bits, impl="triton")
    assert_same(made, quantize(vectors, bits, impl="reference"))
    decoded, wanted = (dequantize(made, bits, dim, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(decoded, wanted, rtol=0 if DEVICE.type == "cpu" else 2**-20, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", BITS)
def test_entries_of_a_layer_go_into_a_slice_of_the_pool(bits: int) -> None:
    """Rows 4 and 5 of the pool; entries that are not kept are NaN, and so is the pool around the slice."""
    slots, dim, count = 50, 96, 39
    index = (torch.randperm(2 * slots, generator=torch.Generator().manual_seed(0))[:count] + 4 * slots).to(DEVICE)
    source = torch.full((2 * slots, dim), torch.nan, device=DEVICE, dtype=torch.bfloat16)
    source[index - 4 * slots] = draw(count, dim, seed=1, dtype=torch.bfloat16)

    def run(impl: Impl) -> Quantized:
        pool = empty(count + 10, dim, bits, torch.float16, DEVICE)
        assert pool.zero is not None
        pool.codes.fill_(255), pool.scale.fill_(torch.nan), pool.zero.fill_(torch.nan)
        part = Quantized(pool.codes[7:-3], pool.scale[7:-3], pool.zero[7:-3])
        assert quantize_entries(source.view(2, slots, dim), index, bits, 4, out=part, impl=impl) is part
        return pool

    made = run("triton")
    assert_same(made, run("reference"))
    assert made.scale[7:-3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rotated_on_the_way(dtype: torch.dtype) -> None:
    """Sums of multiples of 1/16 are exact in any order, and an eighth of them too: the same bits."""
    source = (draw(3, 40, 64, seed=0) * 16).round().div(16).to(dtype)
    index = torch.arange(1, 120, 3, device=DEVICE)
    made, wanted = (
        quantize_entries(source, index, 4, rotation="hadamard", impl=impl) for impl in ("triton", "reference")
    )
    assert_same(made, wanted)


@pytest.mark.parametrize("dim", [32, 128, 256])
def test_rotated_within_half_a_step(dim: int) -> None:
    """Of the rotation in float64; scale and zero are float32, so that nothing else is lost."""
    source, index = draw(1, 21, dim, seed=dim), torch.arange(21, device=DEVICE)
    source[0, 3, 5] = 100.0  # an outlier, which the rotation spreads
    made = quantize_entries(source, index, 8, rotation="hadamard", scale_dtype=torch.float32, impl="triton")
    truth = source[0].double() @ hadamard(dim, DEVICE).double()
    error = (dequantize(made, 8, dim, impl="triton").double() - truth).abs()
    assert (error <= made.scale * 0.5 + source[0].norm(dim=-1, keepdim=True) * dim**0.5 * 2**-22).all()


def test_nothing_to_quantise() -> None:
    source, index = torch.zeros(2, 5, 64, device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    made = quantize_entries(source, index, 3, impl="triton")
    assert made.codes.shape == (0, 24)
    assert dequantize(made, 3, 64, impl="triton").shape == (0, 64)


def test_what_the_kernels_do_not_have_is_refused() -> None:
    vectors = torch.zeros(2, 8, device=DEVICE)
    made = quantize(vectors, 4, 4)
    with pytest.raises(UserError, match=r"^impl='triton': quantize has no kernel for 2 groups per vector, "):
        dequantize(made, 4, 8, impl="triton")
    with pytest.raises(UserError, match=r"^impl='triton': quantize has no kernel for torch.float64, "):
        quantize(vectors.double(), 4, impl="triton")
    with pytest.raises(UserError, match=r"^impl='triton': quantize has no kernel for grid='zero_point', "):
        dequantize(made, 4, 8, "zero_point", impl="triton")
