"""A training step on a model of 8B parameters: `python -m benchmarks.train_step --out parts/train_step.json`.

The prompt is read once; a step attends to what the policy's plan keeps, reads a continuation with gradients and goes
back, by way of every entry's mask, to the policy's parameters. The model is frozen.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.decode import free
from benchmarks.prefill import spent
from benchmarks.results import Clock, Part, arguments, device
from benchmarks.shapes import LLAMA_8B, QWEN_06B, Shape
from benchmarks.timing import Timing
from learnkv import CompressedCache, Policy, attach, continuation, prefill
from learnkv.allocators.adakv import AdaKV
from learnkv.allocators.learned import LearnedAllocator
from learnkv.scorers.snapkv import SnapKV

KEEP = 0.1
TRIED = [(LLAMA_8B, 32768, 512), (QWEN_06B, 32768, 512), (LLAMA_8B, 8192, 512)]
"""Model, tokens of the prompt, tokens of the continuation."""


def main(argv: list[str] | None = None) -> Part:
    """Measure, and write the part of the report."""
    options = arguments(__doc__, argv)
    where = device(options.dry_run)
    part = Part(options.out, "train_step", options.dry_run)
    clock = Clock(options.seconds)
    tried = [(LLAMA_8B.tiny(), 64, 5)] if options.dry_run else TRIED
    model: PreTrainedModel | None = None
    for shape, prompt, new in tried:
        if clock.over():
            return part
        model = None
        free()
        model = attach(shape.build(where))
        measure(part, model, shape, prompt, new)
    part.finish()
    return part


def measure(part: Part, model: PreTrainedModel, shape: Shape, prompt: int, new: int) -> None:
    """Reading, teacher and student of one step, apart and together."""
    window = 8 if prompt < 1000 else 32
    allocator = LearnedAllocator(AdaKV(), shape.layers, shape.kv_heads)
    policy = Policy(SnapKV(window=window), allocator).to(model.device)
    ids = torch.randint(1, shape.vocabulary, (1, prompt), device=model.device)
    said = torch.randint(1, shape.vocabulary, (1, new), device=model.device)
    about: dict[str, Any] = {
        "model": shape.name,
        "B": 1,
        "T": prompt,
        "new": new,
        "dtype": "bfloat16",
        "impl": "learnkv",
    }

    reading, peak, cache = spent(lambda: prefill(model, ids, window=window), 2)
    part.add(reading, kernel="train: prefill", peak_gb=peak, **about)
    if cache is None:
        return
    known = cache

    @torch.no_grad()
    def teach() -> Tensor:
        return continuation(model, said, known.fork()).log_softmax(-1)

    teaching, peak, truth = spent(teach, 2)
    part.add(teaching, kernel="train: teacher", peak_gb=peak, **about)
    if truth is None:
        return

    def step() -> CompressedCache:
        student = policy.relax(known, keep=KEEP)
        logits = continuation(model, said, student)
        loss = (
            torch.nn.functional.kl_div(logits.log_softmax(-1), truth, reduction="none", log_target=True).sum(-1).mean()
        )
        policy.zero_grad()
        loss.backward()
        return student

    stepping, peak, _ = spent(step, 3)
    part.add(stepping, kernel="train: student, forward and backward", peak_gb=peak, **about)
    if isinstance(stepping, Timing):
        gradients = [held.grad for held in policy.parameters() if held.grad is not None]
        assert gradients, "no gradient arrived"
        assert all(bool(one.isfinite().all()) for one in gradients), "a gradient is not finite"


if __name__ == "__main__":
    main()
