"""What it is worth that budgets depend on the prompt: the same policy with features that are not the prompt's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.allocators.base import Allocator, Start
from learnkv.allocators.conditioning import Conditioner
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.generation import prefill
from learnkv.observation import Observation
from learnkv.plan import changed
from learnkv.policy import Policy

TOGETHER = 16
"""Prompts that share a mean."""


class Strange(Allocator):
    """Budgets of `base`, which sees features of other prompts of the batch.

    Args:
        base: an allocator whose features begin with those that condition it.
        of: `next`, those of the next prompt, or `mean`, the mean over the batch, the same for every prompt.
    """

    def __init__(self, base: Allocator, of: str) -> None:
        super().__init__()
        self.base, self.of = base, of
        self.static, self.window = base.static, base.window

    def features(self, seen: Observation) -> Tensor | None:
        found = self.base.features(seen)
        assert found is not None
        own, theirs = found[..., : Conditioner.FEATURES], found[..., Conditioner.FEATURES :]
        other = own.roll(1, 0) if self.of == "next" else own.mean(0, keepdim=True).expand_as(own)
        return torch.cat([other, theirs], -1)

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        return self.split(scores, features, budget, None)

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, start: Start | None) -> Tensor:
        return self.base.split(scores, features, budget, start)


def conditioned(policy: Policy) -> bool:
    """Whether a policy's budgets depend on features of the prompt."""
    return bool(getattr(policy.allocator, "conditioned", False))


def shuffled(policy: Policy, of: str = "next") -> Policy:
    """The policy with features of other prompts."""
    twin = Policy(policy.scorer, Strange(policy.allocator, of), policy.sinks, policy.recent)
    twin.adapter = policy.adapter
    return twin


@torch.no_grad()
def changes(model: Any, policy: Policy, prompts: Sequence[Prompt], keeps: Sequence[float]) -> dict[str, list[float]]:
    """By kept fraction, and for each prompt: the fraction of what is kept that mean features would not keep."""
    static = shuffled(policy, "mean")
    found: dict[str, list[float]] = {f"{keep:g}": [] for keep in keeps}
    for begin in range(0, len(prompts), TOGETHER):
        ids, mask = pad([prompt.read for prompt in prompts[begin : begin + TOGETHER]], "left", model.device)
        cache = prefill(model, ids, mask, window=0, policies=[policy])
        for keep in keeps:
            both = (one.plan(cache, keep=keep) for one in (policy, static))
            found[f"{keep:g}"] += changed(*both).tolist()
    return found
