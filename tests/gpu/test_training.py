"""Training on the device: gradients at the size of a real layer against float64, and a step that fits into memory."""

import dataclasses

import pytest
import torch
from support.kernels import DEVICE, poisoned
from torch import Tensor

from benchmarks.shapes import LLAMA_8B
from learnkv import Policy, attach, continuation, prefill
from learnkv.allocators import AdaKV, LearnedAllocator
from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.mask_gradient import mask_gradient
from learnkv.scorers import SnapKV

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
"""Relative to the norm: weights are rounded before they meet vectors, and so are results."""

SLOTS, NEW = 2048, 128


def numbers(*size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*size, LLAMA_8B.dim, device=DEVICE, dtype=dtype)


def close(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for one, exact in zip(got, truth, strict=True):
        assert (one.double() - exact).norm() <= TOLERANCE[dtype] * exact.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gradient_of_a_mask(dtype: torch.dtype) -> None:
    """Two continuations of one prompt, heads that keep unequal numbers of its entries."""
    torch.manual_seed(0)
    heads, copies = LLAMA_8B.kv_heads, 2
    keys, values = (numbers(1, heads, SLOTS, dtype=dtype) for _ in range(2))
    tails = [numbers(copies, heads, NEW, dtype=dtype) for _ in range(2)]
    asks, grad = (numbers(copies, LLAMA_8B.heads, NEW, dtype=dtype) for _ in range(2))
    length = torch.linspace(0, 600, heads, device=DEVICE).long()
    offset = length.cumsum(0) - length
    at = torch.cat([torch.arange(int(n), device=DEVICE) * 3 + row * SLOTS for row, n in enumerate(length)])
    pools = [held.view(-1, LLAMA_8B.dim)[at] for held in (keys, values)]
    tables = [table.repeat(copies) for table in (offset, length)]
    scaling = LLAMA_8B.dim**-0.5

    def both(exact: bool) -> tuple[Tensor, ...]:
        given = [x.double() if exact else x for x in (asks, *pools, *tails, grad, keys, values)]
        query, kept, tail = given[0], Ragged(*given[1:3], *tables, 600), Tail(*given[3:5])
        impl = "reference" if exact else "triton"
        output, lse = decode_attention(query, kept, tail, scaling, impl=impl)
        return mask_gradient(given[5], query, output, lse, *given[6:], kept, tail, scaling, impl=impl)

    with poisoned():
        got = both(exact=False)
    close(got, both(exact=True), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_soft_gates(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    heads = LLAMA_8B.kv_heads
    held = [numbers(1, heads, SLOTS, dtype=dtype) for _ in range(2)]
    tails = [numbers(1, heads, NEW, dtype=dtype) for _ in range(2)]
    query = numbers(1, LLAMA_8B.heads, NEW, dtype=dtype)
    gates = torch.rand(1, heads, SLOTS, device=DEVICE)
    gates[gates < 0.3] = 0

    def attend(exact: bool) -> Tensor:
        given = [x.double() if exact else x for x in (query, *held, gates, *tails)]
        return gated_attention(
            *given[:4], Tail(*given[4:]), LLAMA_8B.dim**-0.5, impl="reference" if exact else "triton"
        )

    with torch.no_grad(), poisoned():
        got = attend(exact=False)
    close((got,), (attend(exact=True),), dtype)


def test_a_step_needs_nothing_of_the_size_of_queries_times_entries() -> None:
    """Eight layers, 256 tokens after 32k: such a tensor of one layer alone would be 0.54 GB in half precision."""
    shape = dataclasses.replace(LLAMA_8B, layers=8, hidden=1024, ffn=2048, vocabulary=1000)
    model = attach(shape.build(DEVICE))
    ids = torch.randint(1, shape.vocabulary, (1, 32768 + 256), device=DEVICE)
    cache = prefill(model, ids[:, :32768], window=32)
    policy = Policy(SnapKV(), LearnedAllocator(AdaKV(), shape.layers, shape.kv_heads)).to(DEVICE)

    def step() -> None:
        student = policy.relax(cache, keep=0.1)
        policy.zero_grad()
        continuation(model, ids[:, 32768:], student).logsumexp(-1).mean().backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    kept = 0.1 * 32768 * shape.token_bytes
    assert torch.cuda.max_memory_allocated() - before < kept + 0.5e9
    gradients = [held.grad for held in policy.parameters() if held.grad is not None]
    assert gradients
    assert all(bool(one.isfinite().all() and one.abs().sum() > 0) for one in gradients)
