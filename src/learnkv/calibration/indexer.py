"""IndexMem's indexers, trained layer by layer towards the model's own attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer
from learnkv.formats.tensors import stack
from learnkv.inference.prefill import prefill
from learnkv.ops.index_scores import index_keys, index_scores
from learnkv.ops.window_attention import window_logits
from learnkv.policy.policy import Policy

LONGEST = 512
"""Tokens of a context that are read."""
WINDOW, SINKS = 32, 4
"""Queries whose largest score counts, and first tokens that take no part in the loss."""


class _Everything(Scorer):
    """Asks for all queries, hidden states and rotations of a prompt."""

    needs = frozenset({"hidden", "rope"})
    functions = frozenset({"rotation"})
    window = 2**31

    def forward(self, obs: Observation) -> Tensor:
        return torch.zeros_like(obs.valid, dtype=torch.float32)


def indexer(
    model: Any, contexts: Sequence[Tensor], steps: int, learning_rate: float = 0.01, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of the indexers [L, …] after `steps` of Adam, one window of one context [1, S] each."""
    policy = Policy(_Everything())
    layers: list[list[tuple[Observation, Tensor]]] = []
    for context in contexts:
        cache = prefill(model, context[:, :LONGEST].to(model.device), policies=[policy])
        observations = [layer.observation() for layer in cache.compressed_layers()]
        layers.append([(obs, _unrotated(obs)) for obs in observations])
    generator = torch.Generator().manual_seed(seed)
    return stack([_trained(list(layer), steps, learning_rate, generator) for layer in zip(*layers, strict=True)])


def _unrotated(obs: Observation) -> Tensor:
    """All queries [1, N, S, D] before RoPE."""
    return obs.queries.float() if obs.rope is None else obs.rope.unrotate(obs.queries)


def initial_indexer(queries: int, dim: int, hidden: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights for N query heads of D channels and hidden size E: N / 4 index heads of D / 8 channels, 1, 2 at least."""
    heads, features = max(1, queries // 4), max(2, dim // 8)
    return {
        "query.weight": torch.randn(heads * features, queries * dim, generator=generator) * (queries * dim) ** -0.5,
        "q_norm.weight": torch.ones(features),
        "key.weight": torch.randn(features, hidden, generator=generator) * hidden**-0.5,
        "k_norm.weight": torch.ones(features),
        "gate.weight": torch.randn(heads, hidden, generator=generator) * hidden**-0.5,
    }


def indexer_loss(weights: dict[str, Tensor], obs: Observation, plain: Tensor, end: int) -> Tensor:
    """KL, in nats, of the indexer's distribution over entries to the model's, for the queries before token `end`.

    Args:
        obs: of one context, with all queries and hidden states.
        plain: [1, N, S, D] the queries before RoPE.
    """
    assert obs.hidden is not None
    window = slice(max(0, end - WINDOW), end)
    with torch.no_grad():
        logits, _ = window_logits(
            obs.queries[:, :, window],
            obs.keys[:, :, :end],
            query_positions=obs.query_positions[:, window],
            positions=obs.positions[:, :, :end],
            valid=obs.valid[:, :, :end],
            scaling=obs.scaling,
            terms=obs.terms,
        )
        target = logits.amax((1, 2, 3))[0, SINKS:].float().log_softmax(-1)
    keys, gates = index_keys(weights, obs.hidden[:, :end].float())
    scores = index_scores(weights, plain[:, :, window], gates[:, window], keys)
    order = torch.arange(end, device=scores.device)
    scores = scores.masked_fill(order > order[window].unsqueeze(-1), -torch.inf)
    predicted = scores.amax(1)[0, SINKS:].log_softmax(-1)
    return (target.exp() * (target - predicted)).sum()


def _trained(
    contexts: Sequence[tuple[Observation, Tensor]], steps: int, rate: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of one layer."""
    obs, plain = contexts[0]
    assert obs.hidden is not None
    weights = initial_indexer(plain.shape[1], plain.shape[3], obs.hidden.shape[-1], generator)
    weights = {name: part.to(plain.device).requires_grad_() for name, part in weights.items()}
    adam = torch.optim.Adam(weights.values(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        obs, plain = contexts[int(torch.randint(len(contexts), (), generator=generator))]
        first = min(WINDOW + SINKS, plain.shape[2])
        end = int(torch.randint(first, plain.shape[2] + 1, (), generator=generator))
        adam.zero_grad()
        indexer_loss(weights, obs, plain, end).backward()
        adam.step()
        schedule.step()
    return {name: part.detach() for name, part in weights.items()}
