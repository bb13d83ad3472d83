"""Flux Attention's routers, trained on needle trials."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.allocators import Uniform
from learnkv.allocators.pooled_queries import PooledQueries
from learnkv.calibration.gates import answer_kl
from learnkv.calibration.trials import Trial
from learnkv.inference.prefill import prefill
from learnkv.ops.layer_router import router_logits, router_shapes
from learnkv.policy.policy import Policy

FULL_BIAS = 4.5
"""Initial bias of full attention."""


class _Pooling(Uniform):
    """What the routers read, for a prefill."""

    functions = frozenset({"rotation"})

    def __init__(self, size: int) -> None:
        super().__init__()
        self.window, self.pooled = size, PooledQueries(size)
        self.statistics = frozenset({self.pooled})


def layer_router(
    model: Any,
    trials: Sequence[Trial],
    sink: int,
    recent: int,
    steps: int,
    sparsity: float = 0.45,
    pool_size: int = 100,
    learning_rate: float = 0.01,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights [L, …] after `steps` of Adam on the answers' KL to the full cache, one trial a step (arXiv 2604.07394).

    To the loss is added a |s - s*| + b (s - s*)^2 of the mean probability s of sparse layers and their target
    `sparsity`; a and b grow by gradient ascent as long as it is missed. A layer's probability of full attention, drawn
    with Gumbel noise, multiplies the softmax weights of all entries but the first `sink` and the last `recent`.
    """
    generator = torch.Generator().manual_seed(seed)
    pooling = _Pooling(pool_size)
    weights: list[dict[str, Tensor]] = []
    multipliers = torch.ones(2, requires_grad=True)
    for step in range(steps):
        trial = trials[step % len(trials)]
        cache = prefill(model, trial.context.to(model.device), policies=[Policy(None, pooling)])
        layers = cache.compressed_layers()
        if not weights:
            weights = [_initial(layers[0].sizes[1], generator) for _ in layers]
            adam = torch.optim.Adam([weight for layer in weights for weight in layer.values()], learning_rate)
            ascent = torch.optim.Adam([multipliers], 0.05, maximize=True)
        pooled = [pooling.pooled.mean(layer.observation()).cpu() for layer in layers]
        logits = torch.cat([router_logits(*pair) for pair in zip(weights, pooled, strict=True)])  # [L, 2]
        noise = -(-torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).log()).log()
        full = (logits + noise).softmax(-1)[:, 1]
        missed = logits.softmax(-1)[:, 0].mean() - sparsity
        gates = full.unsqueeze(-1).expand(-1, layers[0].heads)
        loss = answer_kl(model, trial, cache, gates, sink, recent)
        loss = loss + multipliers[0] * missed.abs() + multipliers[1] * missed.square()
        for optimiser in (adam, ascent):
            optimiser.zero_grad()
        loss.backward()
        for optimiser in (adam, ascent):
            optimiser.step()
        multipliers.data.clamp_(min=0)
    return {name: torch.stack([layer[name].detach() for layer in weights]) for name in weights[0]}


def _initial(dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of one layer's router, as torch initialises linear layers."""
    weights, shapes = {}, router_shapes(dim)
    for name, shape in shapes.items():
        bound = shapes[name.replace("bias", "weight")][1] ** -0.5
        weights[name] = (2 * torch.rand(shape, generator=generator) - 1) * bound
    weights["r.4.bias"] = torch.tensor([0.0, FULL_BIAS])
    return {name: weight.requires_grad_() for name, weight in weights.items()}
