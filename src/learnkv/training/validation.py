"""KL of the deployed policy, of its base policy and of its soft gates."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.plan import changed
from learnkv.policy.policy import Policy
from learnkv.training.levels import budget_arguments

VALIDATION_KEEPS = (0.5, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class ValidationResult:
    """Results of a batch at one kept fraction; divergences from the full cache in nats per token."""

    learned: Tensor
    """[] divergence of the deployed policy."""
    heuristic: Tensor
    """[] divergence of the base policy, the heuristic that training starts from."""
    soft: Tensor
    """[] divergence with the soft gates of the same plan in the forward pass."""
    changed: Tensor
    """[] fraction of the kept entries that the base policy evicts."""
    marginal: Tensor
    """[L, H] first-order decrease of `learned` per additional entry of a head, mean over prompts.

    Equal for all heads at the optimal split of a budget.
    """

    @property
    def gap(self) -> Tensor:
        """[] divergence of hard eviction above that of the soft gates."""
        return self.learned - self.soft

    def metrics(self) -> dict[str, Tensor]:
        """The scalars by their names in logs."""
        kl = {"learned_kl": self.learned, "heuristic_kl": self.heuristic, "soft_kl": self.soft}
        return {**kl, "gap": self.gap, "changed": self.changed}


def measure(
    policy: Policy,
    cache: CompressedCache,
    keep: float,
    temperature: float,
    divergence: Callable[[CompressedCache], Tensor],
) -> ValidationResult:
    """Compare a policy with its base policy and with its soft gates, on the prompts in `cache`.

    Args:
        cache: B complete prompts with the observations that `policy` needs; unchanged.
        keep: kept fraction of a prompt's entries.
        temperature: of the soft top-k.
        divergence: mean [] over the tokens of the continuations after a student's cache, which it consumes.
    """
    base, spend = policy.base_policy(), budget_arguments(policy, keep)
    with torch.enable_grad():  # relax takes the scale of learned scores from their gradient
        plan = policy.plan(cache, **spend)
    with torch.no_grad():
        base_plan = base.plan(cache, **spend)
        heuristic = divergence(base.relax(cache, **spend, plan=base_plan))
        soft = divergence(policy.relax(cache, **spend, plan=plan, temperature=temperature, soft=True))
    wanted = plan.wanted.detach().requires_grad_(True)
    with torch.enable_grad():
        differentiable = replace(plan, wanted=wanted)
        learned = divergence(policy.relax(cache, **spend, plan=differentiable, temperature=temperature))
        (slope,) = torch.autograd.grad(learned, wanted)
    difference = changed(plan, base_plan).mean()
    return ValidationResult(learned.detach(), heuristic, soft, difference, -slope.sum(1).float())
