"""Nothing waits for the device: not compression, not a decode step; and a graph says what steps one by one say."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from support.kernels import DEVICE
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shapes import LLAMA_8B, QWEN_7B, Shape
from learnkv import CompressedCache, Policy, attach, continuation, generate, prefill
from learnkv.allocators import AdaKV, Pyramid, Uniform
from learnkv.errors import UserError
from learnkv.ops.dispatch import using
from learnkv.scorers import Knorm, SnapKV, StreamingLLM

pytestmark = pytest.mark.gpu

POLICIES = {
    "snapkv": lambda: Policy(SnapKV(window=16), Uniform()),
    "pyramidkv": lambda: Policy(SnapKV(window=16), Pyramid()),
    "adakv": lambda: Policy(SnapKV(window=16), AdaKV()),
    "knorm": lambda: Policy(Knorm(), AdaKV()),
    "streaming_llm": lambda: Policy(StreamingLLM(), Uniform()),
}


def model_of(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    return attach(shape.tiny().build(DEVICE, dtype))


def tokens(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 97, size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within the block an operation that makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_alarm_rings() -> None:
    with pytest.raises(RuntimeError, match="synchronizing"), no_waiting():
        tokens(3).sum().item()


def compressed(model: PreTrainedModel, policy: Policy, batch: int = 2, keep: float = 0.2) -> CompressedCache:
    return policy.to(DEVICE).compress(prefill(model, tokens(batch, 700), window=16), keep=keep)


@pytest.mark.parametrize("name", POLICIES)
def test_compression(name: str) -> None:
    model, policy = model_of(LLAMA_8B), POLICIES[name]().to(DEVICE)
    cache = prefill(model, tokens(2, 700), window=16)
    policy.compress(cache.fork(), keep=0.2)  # compiles
    with no_waiting():
        policy.compress(cache, keep=0.2)
    assert cache.spent == pytest.approx([0.2, 0.2], abs=1e-3)


def test_a_decode_step() -> None:
    model = model_of(LLAMA_8B)
    cache = compressed(model, POLICIES["adakv"]())
    token = tokens(2, 1)
    with torch.no_grad():
        continuation(model, token, cache)
        with no_waiting():
            for _ in range(3):
                continuation(model, token, cache)


@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_7B], ids=lambda shape: shape.name)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_says_the_same(shape: Shape, batch: int) -> None:
    """Two turns, so that the second replays the graph of the first where its buffers still fit."""
    model = model_of(shape)
    cache = compressed(model, POLICIES["adakv"](), batch)
    said = []
    for graph in (True, False):
        fork = cache.fork()
        said.append(
            [generate(model, tokens(batch, 5, seed=turn), fork, max_new_tokens=40, graph=graph) for turn in (1, 2)]
        )
    for one, other in zip(*said, strict=True):
        assert torch.equal(one, other)
    assert len(set(said[0][0].flatten().tolist())) > 3  # not one token over and over


def test_a_graph_draws_the_same() -> None:
    model = model_of(LLAMA_8B)
    cache = compressed(model, POLICIES["snapkv"]())
    drawn = [
        generate(model, tokens(2, 3), cache.fork(), max_new_tokens=30, do_sample=True, top_k=20, seed=seed, graph=graph)
        for seed, graph in ((1, True), (1, False), (2, True))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_questions_of_different_lengths_in_a_graph() -> None:
    model = model_of(LLAMA_8B)
    cache = compressed(model, POLICIES["adakv"]())
    question = tokens(2, 6)
    mask = torch.ones_like(question)
    mask[0, 3:] = 0
    said = [generate(model, question, cache.fork(), mask, max_new_tokens=24, graph=graph) for graph in (True, False)]
    assert torch.equal(*said)


def test_kernels_say_what_references_say() -> None:
    """In single precision a whole model gives the same tokens and keeps the same entries."""
    model = model_of(LLAMA_8B, torch.float32)
    found = []
    for impl in ("triton", "reference"):
        with using(impl):
            cache = compressed(model, POLICIES["adakv"]())
            said = generate(model, tokens(2, 5), cache, max_new_tokens=16, graph=False)
        found.append((cache.budgets, cache.kept_positions(0, 0, 0), cache.kept_positions(1, 1, 1), said))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_a_graph_is_refused_by_name() -> None:
    model = model_of(LLAMA_8B)
    cache = compressed(model, POLICIES["snapkv"]())
    with using("reference"), pytest.raises(UserError, match="graph=True"):
        generate(model, tokens(2, 3), cache, max_new_tokens=4, graph=True)
