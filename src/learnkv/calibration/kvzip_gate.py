"""Fast KVzip's gate, trained to predict KVzip's scores from hidden states."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learnkv.formats.tensors import stack
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy
from learnkv.scorers import KVzip
from learnkv.scorers.gate import gate_scores, initial_gate

FEATURES, BASE_KEYS = 16, 16


class _Targets(KVzip):
    """KVzip's scores, with hidden states in the observations."""

    needs = frozenset({"hidden"})


def kvzip_gate(
    model: Any, contexts: Sequence[Tensor], steps: int, batch: int = 1024, learning_rate: float = 0.01, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of the gate [L, …] after `steps` of Adam on the binary cross-entropy to KVzip's scores of `contexts`.

    Contexts are [1, S] each. A step samples `batch` tokens of all of them; every layer is trained separately.
    """
    kvzip = Policy(_Targets())
    inputs: list[list[Tensor]] = []
    targets: list[list[Tensor]] = []
    for context in contexts:
        layers = prefill(model, context.to(model.device), window=1, policies=[kvzip]).compressed_layers()
        for index, layer in enumerate(layers):
            if index == len(inputs):
                inputs.append([])
                targets.append([])
            obs = layer.observation()
            assert obs.hidden is not None and kvzip.scorer is not None
            inputs[index].append(obs.hidden[0].float())
            targets[index].append(kvzip.scorer(obs)[0].clamp(0, 1))
            group = obs.num_key_value_groups
    generator = torch.Generator().manual_seed(seed)
    return stack(
        [
            _trained(torch.cat(xs), torch.cat(ys, 1), group, steps, batch, learning_rate, generator)
            for xs, ys in zip(inputs, targets, strict=True)
        ]
    )


def _trained(
    hidden: Tensor, target: Tensor, group: int, steps: int, batch: int, rate: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """Weights of one layer from hidden states [N, E] and scores [H, N]."""
    heads, width = target.shape[0], hidden.shape[-1]

    def random_normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(hidden.device)

    weights = initial_gate(random_normal, heads, group, width, FEATURES, BASE_KEYS)
    adam = torch.optim.Adam([weight.requires_grad_() for weight in weights.values()], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        sample = torch.randint(len(hidden), (batch,), generator=generator).to(hidden.device)
        score = gate_scores(weights, hidden[sample].unsqueeze(0))[0]
        adam.zero_grad()
        F.binary_cross_entropy(score.clamp(1e-6, 1 - 1e-6), target[:, sample]).backward()
        adam.step()
        schedule.step()
    return {name: weight.detach() for name, weight in weights.items()}
