"""Lossless decoding while the host holds the full cache."""

import dataclasses

import pytest
import torch
from support.kernels import DEVICE

from benchmarks.shapes import LLAMA_8B
from learnkv import Policy, attach, generate, generate_lossless, prefill
from learnkv.scorers import SnapKV

pytestmark = pytest.mark.gpu

PROMPT = 8192
SHAPE = dataclasses.replace(LLAMA_8B, layers=4, hidden=512, ffn=1024, vocabulary=1000)


def test_an_offloaded_prompt_leaves_the_device_and_decides_alike() -> None:
    model = attach(SHAPE.build(DEVICE).float())
    ids = torch.randint(1, SHAPE.vocabulary, (1, PROMPT), device=DEVICE)
    full, policy = prefill(model, ids, window=32), Policy(SnapKV())
    expected = generate(model, ids[:, :4], full.fork(), max_new_tokens=16)
    draft = policy.compress(full.fork(), keep=0.1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = generate_lossless(model, ids[:, :4], full, draft, max_new_tokens=16, offload=True)
    assert torch.equal(output.tokens, expected)
    assert before - torch.cuda.memory_allocated() > 0.9 * full.full_nbytes
    assert all(layer.segment.keys.is_pinned() for layer in full.compressed_layers())
