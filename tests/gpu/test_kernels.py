"""Kernels on the device at the sizes of real models, against float64; what they leave unwritten would be NaN.

The tests of tests/ops/test_triton_*.py take the odd sizes, on the device too where there is one.
"""

import pytest
import torch
from support.kernels import DEVICE, poisoned
from torch import Tensor

from benchmarks.shapes import LLAMA_8B, QWEN_05B, QWEN_7B, Shape
from benchmarks.sweeps import pages
from benchmarks.sweeps.decode import Case, Inputs, row_lengths
from learnkv.ops.arguments import Pages, Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gather_kv import gather_kv
from learnkv.ops.page_bounds import page_scores
from learnkv.ops.select import select, select_slots
from learnkv.ops.window_scores import window_scores

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 5e-3, torch.float32: 2e-6}
"""Relative to the norm of the output: roundings of one bfloat16 product and sum, or of single precision."""


def relative(got: Tensor, truth: Tensor) -> float:
    return float((got.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("shape", "batch", "kept", "skew"),
    [
        (LLAMA_8B, 8, 512, "uniform"),
        (LLAMA_8B, 32, 2048, "adakv"),
        (LLAMA_8B, 1, 13107, "dominant"),
        (QWEN_7B, 8, 2048, "adakv"),
        (QWEN_05B, 8, 2048, "uniform"),
    ],
)
def test_decode_attention(shape: Shape, batch: int, kept: int, skew: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = Inputs.random(
        Case(shape, batch, kept, skew), row_lengths(batch, shape.kv_heads, kept, skew), DEVICE, dtype
    )
    inputs.tail_keys[:, :, 16:] = inputs.tail_values[:, :, 16:] = torch.nan  # capacity that is not in use
    with poisoned():
        assert inputs.error(inputs.ours()) < TOLERANCE[dtype]


def test_several_new_tokens_see_each_other_causally() -> None:
    """A question of 24 tokens over unequal heads, every output against float64."""
    torch.manual_seed(0)
    shape, batch, new, kept = LLAMA_8B, 2, 24, 300
    lengths = row_lengths(batch, shape.kv_heads, kept, "adakv")
    inputs = Inputs.random(Case(shape, batch, kept, "adakv"), lengths, DEVICE)
    query = torch.randn(batch, shape.heads, new, shape.dim, device=DEVICE, dtype=torch.bfloat16)
    tails = [tail[:, :, : new + 5] for tail in (inputs.tail_keys, inputs.tail_values)]

    def attend(exact: bool) -> tuple[Tensor, Tensor]:
        given = [x.double() if exact else x for x in (query, inputs.keys, inputs.values, *tails)]
        kept = Ragged(*given[1:3], inputs.offset, inputs.length, max(lengths))
        impl = "reference" if exact else "triton"
        return decode_attention(given[0], kept, Tail(*given[3:]), inputs.scaling, impl=impl)

    with poisoned():
        output, lse = attend(exact=False)
    truth, log_mass = attend(exact=True)
    assert relative(output, truth) < TOLERANCE[torch.bfloat16]
    assert relative(lse, log_mass) < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("shape", "batch"), [(LLAMA_8B, 2), (QWEN_7B, 1)])
def test_window_scores(shape: Shape, batch: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    slots, window = 16384 + 5, 32
    queries = torch.randn(batch, shape.heads, window, shape.dim, device=DEVICE, dtype=dtype)
    keys = torch.randn(batch, shape.kv_heads, slots, shape.dim, device=DEVICE, dtype=dtype)
    places = torch.arange(slots, device=DEVICE).expand(batch, slots)
    there = torch.ones(batch, slots, dtype=torch.bool, device=DEVICE)

    def score(exact: bool) -> Tensor:
        return window_scores(
            queries.double() if exact else queries,
            keys.double() if exact else keys,
            query_positions=places[:, slots - window :],
            positions=places.unsqueeze(1).expand(batch, shape.kv_heads, slots),
            valid=there.unsqueeze(1).expand(batch, shape.kv_heads, slots),
            scaling=shape.dim**-0.5,
            kernel_size=7,
            impl="reference" if exact else "triton",
        )

    with poisoned():
        got = score(exact=False)
    assert relative(got, score(exact=True).double()) < 1e-4  # products of the inputs are exact in single precision


@pytest.mark.parametrize(("rows", "slots"), [(8, 131072), (256, 32768)])
def test_select(rows: int, slots: int) -> None:
    """The indices of a stable sort; scores of attention in half precision, so that many tie."""
    torch.manual_seed(0)
    scores = torch.randn(rows, slots, device=DEVICE).mul(3).softmax(-1).bfloat16().float()
    budget = torch.randint(0, slots // 4, (rows,), device=DEVICE)
    total = int(budget.sum())
    with poisoned():
        got = select(scores, budget, total, impl="triton")
    assert torch.equal(got, select(scores, budget, total, impl="reference"))


@pytest.mark.parametrize("dim", [64, 128])
def test_gather(dim: int) -> None:
    torch.manual_seed(0)
    rows, slots = 64, 8192
    keys, values = (torch.randn(rows, slots, dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    length = torch.randint(0, 2000, (rows,), device=DEVICE)
    total, offset = int(length.sum()), length.cumsum(0) - length
    index = select(torch.rand(rows, slots, device=DEVICE), length, total, impl="triton")
    pools = [torch.full((total, dim), torch.nan, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)]
    gather_kv(keys, values, index, 0, Ragged(*pools, offset, length, slots), impl="triton")
    for held, pool in ((keys, pools[0]), (values, pools[1])):
        assert torch.equal(pool, held.view(-1, dim)[index])


@pytest.mark.parametrize(("batch", "prompt"), [(8, 32768), (1, 131072)])
def test_reading_pages(batch: int, prompt: int) -> None:
    """Bounds, scores, the list of the best pages and the attention to them, each given what the one before made."""
    torch.manual_seed(0)
    inputs = pages.Inputs(LLAMA_8B, batch, prompt, 2048, DEVICE)
    parts = inputs.keys.view(-1, prompt // pages.PAGE, pages.PAGE, LLAMA_8B.dim)
    assert torch.equal(inputs.bounds, torch.stack([parts.amin(2), parts.amax(2)], 1))
    with poisoned():
        scores = inputs.score("triton")
        listed = select_slots(scores, inputs.budget, inputs.most, impl="triton")
        got = inputs.attend(listed)
    query = inputs.query[:, :, 0].double()
    assert relative(scores, page_scores(query, inputs.bounds.double(), inputs.pages, "max")) < TOLERANCE[torch.float32]
    assert torch.equal(listed, select_slots(scores, inputs.budget, inputs.most, impl="reference"))
    kept = inputs.kept._replace(keys=inputs.keys.double(), values=inputs.values.double())
    tail = Tail(*(part.double() for part in inputs.tails))
    truth, _ = decode_attention(
        inputs.query.double(), kept, tail, inputs.scaling, Pages(listed, pages.PAGE), impl="reference"
    )
    assert relative(got, truth) < TOLERANCE[torch.bfloat16]
