"""Gumbel noise on scores: exploration of entries that the policy would not keep."""

from dataclasses import replace

import torch

from learnkv.core.plan import Plan
from learnkv.ops.normal_scores import unit_scale


def with_gumbel_noise(plan: Plan, scale: float, seed: int) -> Plan:
    """The plan with Gumbel noise of this scale on the scores of unprotected entries; budgets are unchanged.

    The kept entries are then a sample without replacement, with probabilities in proportion to exp(score / scale) at
    every draw (Gumbel top-k: Kool et al., arXiv 1903.06059).
    """
    scores = unit_scale(plan.scores)
    generator = torch.Generator(scores.device).manual_seed(seed)
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float32, device=scores.device)
    noise = -(-uniform.clamp(1e-9, 1 - 1e-7).log()).log()
    return replace(plan, scores=torch.where(scores.isfinite(), scores + scale * noise, scores))
