"""What it is worth that budgets depend on the prompt: the same policy with features that are not the prompt's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.allocators.conditioning import Conditioner
from learnkv.core.allocator import Allocator, Baseline
from learnkv.core.observation import Observation
from learnkv.core.plan import changed
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy

TOGETHER = 16
"""Prompts that are read at once."""


class Strange(Allocator):
    """Budgets of `base`, which sees features of other prompts: those of row i of a batch are `others[i % N]`.

    Args:
        base: an allocator whose features begin with those that condition it.
        others: how many prompts N there are to take features from; `others` [N, L, H, F] is to be filled with them.
    """

    others: Tensor

    def __init__(self, base: Allocator, others: int = 1) -> None:
        super().__init__()
        self.base = base
        self.static, self.window = base.static, base.window
        self.register_buffer("others", torch.zeros(others, 0, 0, 0))

    def features(self, obs: Observation) -> Tensor | None:
        found = self.base.features(obs)
        assert found is not None
        rows = torch.arange(len(found), device=found.device) % len(self.others)
        other = self.others[:, obs.layer_idx].to(found.device)[rows]
        return torch.cat([other, found[..., other.shape[-1] :]], -1)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        return self.split(scores, features, budget, None)

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, start: Baseline | None) -> Tensor:
        return self.base.split(scores, features, budget, start)

    def ranking(self, scores: Tensor, features: Tensor | None, budget: Tensor, start: Baseline | None) -> Tensor | None:
        return self.base.ranking(scores, features, budget, start)


def conditioned(policy: Policy) -> bool:
    """Whether a policy's budgets depend on features of the prompt."""
    return bool(getattr(policy.allocator, "conditioned", False))


@torch.no_grad()
def features_of(model: Any, policy: Policy, prompts: Sequence[Prompt]) -> Tensor:
    """What a conditioned policy's budgets depend on, [N, L, H, F] of N prompts."""
    found = []
    for begin in range(0, len(prompts), TOGETHER):
        cache = _read(model, policy, prompts[begin : begin + TOGETHER])
        obs = [layer.observation() for layer in cache.compressed_layers()]
        found.append(torch.stack([one for one in map(policy.allocator.features, obs) if one is not None], 1))
    return torch.cat(found)[..., : Conditioner.FEATURES]


def shuffled(policy: Policy, features: Tensor) -> Policy:
    """The policy with features [N, L, H, F] of other prompts, in turn."""
    strange = Strange(policy.allocator, len(features))
    strange.others = features
    twin = Policy(policy.scorer, strange, policy.sinks, policy.recent, precision=policy.precision)
    twin.adapter = policy.adapter
    return twin


@torch.no_grad()
def changes(model: Any, policy: Policy, prompts: Sequence[Prompt], keeps: Sequence[float]) -> dict[str, list[float]]:
    """By kept fraction, and for each prompt: the fraction of what is kept that their mean features would not keep."""
    static = shuffled(policy, features_of(model, policy, prompts).mean(0, keepdim=True))
    found: dict[str, list[float]] = {f"{keep:g}": [] for keep in keeps}
    for begin in range(0, len(prompts), TOGETHER):
        cache = _read(model, policy, prompts[begin : begin + TOGETHER])
        for keep in keeps:
            both = (one.plan(cache, keep=keep) for one in (policy, static))
            found[f"{keep:g}"] += changed(*both).tolist()
    return found


def _read(model: Any, policy: Policy, prompts: Sequence[Prompt]) -> Any:
    ids, mask = pad([prompt.prefill_ids for prompt in prompts], "left", model.device)
    return prefill(model, ids, mask, window=0, policies=[policy])
