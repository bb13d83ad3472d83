"""What a policy is worth as it would be deployed, beside its heuristic and beside its own soft gates."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.plan import changed
from learnkv.policy.policy import Policy

VALIDATION_KEEPS = (0.5, 0.25, 0.1, 0.05)


@dataclass(frozen=True)
class Measured:
    """A batch at one kept fraction; divergences from the full cache in nats per token."""

    learned: Tensor
    """[] divergence of the deployed set."""
    heuristic: Tensor
    """[] divergence of what the heuristic below the policy keeps."""
    soft: Tensor
    """[] divergence with the soft gates of the same plan in the forward pass."""
    changed: Tensor
    """[] fraction of what the policy keeps that its heuristic does not keep."""
    marginal: Tensor
    """[L, H] how much one more entry for a head would lower `learned`, to first order, mean over prompts.

    At the best split of a budget all heads have the same.
    """

    @property
    def gap(self) -> Tensor:
        """[] what hard sets lose against the soft gates that gradients come from."""
        return self.learned - self.soft


def measure(
    policy: Policy,
    cache: CompressedCache,
    keep: float,
    temperature: float,
    divergence: Callable[[CompressedCache], Tensor],
) -> Measured:
    """Compare what `policy` keeps of the prompts in `cache` with its heuristic and with its soft gates.

    Args:
        cache: B prompts, complete, read for `policy`; it is left as it was.
        keep: fraction of a prompt's entries that stays.
        temperature: of the soft top-k.
        divergence: mean [] over the tokens that are read after a student's cache, which it uses up.
    """
    start = policy.base_policy()
    with torch.enable_grad():  # learned scores have a scale of their own, which their gradient tells relax
        plan = policy.plan(cache, keep=keep)
    with torch.no_grad():
        plain = start.plan(cache, keep=keep)
        heuristic = divergence(start.relax(cache, keep=keep, plan=plain))
        soft = divergence(policy.relax(cache, keep=keep, plan=plan, temperature=temperature, soft=True))
    wanted = plan.wanted.detach().requires_grad_(True)
    with torch.enable_grad():
        asked = replace(plan, wanted=wanted)
        learned = divergence(policy.relax(cache, keep=keep, plan=asked, temperature=temperature))
        (slope,) = torch.autograd.grad(learned, wanted)
    return Measured(learned.detach(), heuristic, soft, changed(plan, plain).mean(), -slope.sum(1).float())
