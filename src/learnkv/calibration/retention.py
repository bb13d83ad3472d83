"""TrimKV's gates, trained layer by layer by attention to faded entries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.formats.tensors import stack
from learnkv.inference.prefill import prefill
from learnkv.ops.retention_attention import retention_attention
from learnkv.policy.policy import Policy
from learnkv.scorers.trimkv import initial_gate, log_retention

WIDTH, BIAS = 64, 4.0
"""Hidden units, and a bias at first at which half of a token is left after some forty."""


LONGEST = 384
"""Tokens of a context that are read."""


class _Everything(Scorer):
    """Asks for all queries and hidden states of a prompt."""

    needs = frozenset({"hidden"})
    window = 2**31

    def forward(self, obs: Observation) -> Tensor:
        return torch.zeros_like(obs.valid, dtype=torch.float32)


def retention_gates(
    model: Any,
    contexts: Sequence[Tensor],
    keep: float,
    steps: int,
    penalty: float = 0.3,
    learning_rate: float = 0.02,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights of the gates [L, …] after `steps` of Adam, one context [1, S] each; every layer is trained by itself.

    Of a context the first `LONGEST` tokens are read: what a step computes grows with their square.

    The loss is the error of the attention output, relative to its size, plus `penalty` times the part by which what
    is retained, sum_j beta_j^(i - j), exceeds `keep` of the context, on average over its tokens i.
    """
    policy = Policy(_Everything())
    observations: list[list[Observation]] = []
    for context in contexts:
        cache = prefill(model, context[:, :LONGEST].to(model.device), policies=[policy])
        observations.append([layer.observation() for layer in cache.compressed_layers()])
    generator = torch.Generator().manual_seed(seed)
    layers = [list(layer) for layer in zip(*observations, strict=True)]
    return stack([_trained(layer, keep, steps, penalty, learning_rate, generator) for layer in layers])


def _trained(
    contexts: Sequence[Observation], keep: float, steps: int, penalty: float, rate: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of one layer."""
    first = contexts[0]
    assert first.hidden is not None
    heads, width = first.keys.shape[1], first.hidden.shape[-1]
    gate = {name: part[0].to(first.keys.device) for name, part in initial_gate(1, heads, width, WIDTH, BIAS).items()}
    gate["in.weight"] = torch.randn(gate["in.weight"].shape, generator=generator).to(first.keys.device) * width**-0.5
    adam = torch.optim.Adam([part.requires_grad_() for part in gate.values()], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for step in torch.randint(len(contexts), (steps,), generator=generator).tolist():
        error, excess = retention_losses(gate, contexts[step], keep)
        adam.zero_grad()
        (error + penalty * excess).backward()
        adam.step()
        schedule.step()
    return {name: part.detach() for name, part in gate.items()}


def retention_losses(gate: dict[str, Tensor], obs: Observation, keep: float) -> tuple[Tensor, Tensor]:
    """Relative error of one layer's attention outputs, and the part by which `keep` of its entries is exceeded."""
    assert obs.hidden is not None
    faded = log_retention(gate, obs.hidden.float()).transpose(1, 2)  # [1, H, S]
    parts = (obs.queries, obs.keys, obs.values)
    with torch.no_grad():
        full = retention_attention(*parts, torch.zeros_like(faded), obs.scaling, terms=obs.terms)
    error = (
        retention_attention(*parts, faded, obs.scaling, terms=obs.terms) - full
    ).square().sum() / full.square().sum()
    place = torch.arange(faded.shape[-1], device=faded.device)
    age = place.unsqueeze(-1) - place  # [S, S]
    retained = (faded.unsqueeze(2) * age.clamp(min=0)).exp().masked_fill(age < 0, 0.0).sum(-1)  # [1, H, S]
    most = keep * faded.shape[-1]
    return error, (retained / most - 1).clamp(min=0).mean()
