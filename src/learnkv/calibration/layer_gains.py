"""What each layer gains an answer by attending to everything, where the others attend to sinks and a window."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.calibration.gates import gated_answer
from learnkv.calibration.trials import Trial
from learnkv.inference.prefill import prefill


@torch.no_grad()
def layer_gains(model: Any, trials: Iterable[Trial], sink: int, recent: int) -> Tensor:
    """Nats per token of the true answers [L], at least 0, that one full layer saves (arXiv 2606.27791).

    The difference of the answers' negative log-likelihood with all layers attending to the first `sink` and the last
    `recent` tokens, and with layer l attending to everything. The authors read the prompt in this way, too; here it is
    read with full attention, as policies compress it.
    """
    return torch.stack([_gains(model, trial, sink, recent) for trial in trials]).mean(0).clamp_min(0)


def _gains(model: Any, trial: Trial, sink: int, recent: int) -> Tensor:
    """Nats per token [L] of one answer."""
    cache = prefill(model, trial.context.to(model.device))
    layers, heads = len(cache.compressed_layers()), cache.compressed_layers()[0].heads
    tokens = trial.answer.to(model.device).unsqueeze(-1)
    losses = []
    for full in range(-1, layers):
        gates = torch.zeros(layers, heads)
        if full >= 0:
            gates[full] = 1.0
        logarithms = gated_answer(model, trial, cache, gates, sink, recent)
        losses.append(-logarithms.gather(-1, tokens).mean().double().cpu())
    return losses[0] - torch.stack(losses[1:])
