"""What is alive, and what was at the worst moment, while a long prompt is compressed."""

import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch
from support.kernels import DEVICE
from transformers import PreTrainedModel

from benchmarks.shapes import LLAMA_8B
from learnkv import CompressedCache, Policy, attach, generate, prefill
from learnkv.allocators import AdaKV, Uniform
from learnkv.scorers import SnapKV

pytestmark = pytest.mark.gpu

PROMPT, KEEP = 32768, 0.1
SHAPE = dataclasses.replace(LLAMA_8B, layers=8, hidden=1024, ffn=2048, vocabulary=1000)
FULL = PROMPT * SHAPE.token_bytes
"""1.07 GB."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return attach(SHAPE.build(DEVICE))


def peak(call: Callable[[], CompressedCache]) -> tuple[int, CompressedCache]:
    """Bytes above what was allocated before, at the worst moment, and what was made."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, made


def read(model: PreTrainedModel, **options: object) -> CompressedCache:
    ids = torch.randint(1, SHAPE.vocabulary, (1, PROMPT), device=DEVICE)
    return prefill(model, ids, window=32, **options)  # type: ignore[arg-type]


def test_compression_makes_the_pool_and_little_else(model: PreTrainedModel) -> None:
    policy = Policy(SnapKV(), AdaKV())
    cache = read(model)
    policy.compress(cache.fork(), keep=KEEP)  # compiles
    extra, small = peak(lambda: policy.compress(cache.fork(), keep=KEEP))
    scores = SHAPE.layers * SHAPE.kv_heads * PROMPT * 4
    # Scores of all layers, a few copies of them, and what sorts them; not one tensor of heads x window x slots.
    assert extra < 1.02 * KEEP * FULL + 12 * scores
    assert 12 * scores < SHAPE.heads * 32 * PROMPT * 4 * SHAPE.layers / 10
    assert small.nbytes == pytest.approx(KEEP * FULL * (1 + 4 / 512), rel=0.01)


def test_what_is_evicted_is_freed(model: PreTrainedModel) -> None:
    before = torch.cuda.memory_allocated()
    cache = read(model)
    assert torch.cuda.memory_allocated() - before >= FULL
    Policy(SnapKV(), AdaKV()).compress(cache, keep=KEEP)
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 1.02 * cache.nbytes + 2**22
    del cache
    gc.collect()
    assert torch.cuda.memory_allocated() - before <= 2**22


def test_read_once_the_full_cache_never_exists(model: PreTrainedModel) -> None:
    policy = Policy(SnapKV(), Uniform())
    read(model, policy=policy, keep=KEEP)
    whole, cache = peak(lambda: read(model))
    del cache
    once, cache = peak(lambda: read(model, policy=policy, keep=KEEP))
    assert cache.spent == pytest.approx([KEEP], abs=1e-3)
    assert whole - once > (1 - KEEP - 2 / SHAPE.layers) * FULL


def test_generation_allocates_nothing_of_the_size_of_the_cache(model: PreTrainedModel) -> None:
    cache = read(model, policy=Policy(SnapKV(), Uniform()), keep=KEEP)
    question = torch.ones(1, 3, dtype=torch.long, device=DEVICE)
    generate(model, question, cache.fork(), max_new_tokens=8)
    extra, _ = peak(lambda: (generate(model, question, cache, max_new_tokens=40), cache)[1])
    assert extra < 0.25 * cache.nbytes
