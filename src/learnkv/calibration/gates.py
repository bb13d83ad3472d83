"""DuoAttention's head gates, trained on needle trials."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.calibration.trials import Trial
from learnkv.inference.generate import continuation
from learnkv.inference.prefill import prefill


def head_gates(
    model: Any,
    trials: Sequence[Trial],
    sink: int,
    recent: int,
    steps: int,
    penalty: float,
    learning_rate: float = 0.05,
) -> Tensor:
    """Gates [L, H] in [0, 1] by Adam on the answers' KL to the full cache plus `penalty` * mean gate, one trial a step.

    A gate multiplies the softmax weight of all entries of its head but the first `sink` and the last `recent`. The
    authors mix the outputs of full and streaming attention instead; at 0 and at 1 both are the same.
    """
    gates: Tensor | None = None
    for step in range(steps):
        trial = trials[step % len(trials)]
        cache = prefill(model, trial.context.to(model.device))
        layers = cache.compressed_layers()
        if gates is None:
            gates = torch.ones(len(layers), layers[0].heads, dtype=torch.float32, requires_grad=True)
            adam = torch.optim.Adam([gates], learning_rate)
        adam.zero_grad()
        (answer_kl(model, trial, cache, gates, sink, recent) + penalty * gates.mean()).backward()
        adam.step()
        gates.data.clamp_(0, 1)
    assert gates is not None
    return gates.detach()


def answer_kl(model: Any, trial: Trial, cache: CompressedCache, gates: Tensor, sink: int, recent: int) -> Tensor:
    """KL to the full cache, in nats per token of the answer, with gates [L, H] of streaming heads; differentiable."""
    ids = torch.cat([trial.question, trial.answer], 1).to(model.device)
    with torch.no_grad():
        teacher = continuation(model, ids, cache.fork())[:, trial.question.shape[1] - 1 : -1].log_softmax(-1)
    gated = gated_answer(model, trial, cache, gates, sink, recent)
    return (teacher.exp() * (teacher - gated)).sum(-1).mean().cpu()


def gated_answer(model: Any, trial: Trial, cache: CompressedCache, gates: Tensor, sink: int, recent: int) -> Tensor:
    """Log-probabilities [1, A, V] of the answer's tokens with gates [L, H] of streaming heads; differentiable."""
    ids = torch.cat([trial.question, trial.answer], 1).to(model.device)
    student = cache.fork()
    positions = torch.arange(trial.context.shape[1])
    protected = (positions < sink) | (positions >= len(positions) - recent)
    for layer, layer_gates in zip(student.compressed_layers(), gates, strict=True):
        layer.gate(torch.where(protected, 1.0, layer_gates.view(1, -1, 1)).to(layer.device))
    logits: Tensor = continuation(model, ids, student)[:, trial.question.shape[1] - 1 : -1]
    return logits.log_softmax(-1)
