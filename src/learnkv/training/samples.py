"""Students of samples of what a plan keeps."""

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.plan import Plan
from learnkv.errors import UserError
from learnkv.policy.policy import Policy
from learnkv.training.gumbel_noise import with_gumbel_noise
from learnkv.training.objectives import Comparison, Objective, Outputs


def check_samples(policy: Policy) -> None:
    """Raise UserError for a policy of which samples are not drawn."""
    if policy.precision is not None or policy.evict_interval:
        raise UserError(
            "objective: samples of what is kept are of entries of a prompt; expected no precision, no evict_interval"
        )


def loss(
    policy: Policy,
    objective: Objective,
    cache: CompressedCache,
    keep: float,
    inputs: Comparison,
    outputs: Callable[[CompressedCache], Outputs],
    rng: random.Random,
) -> Tensor:
    """[B] loss of an objective over its samples of a plan, which alone has a gradient.

    Args:
        objective: with `samples`.
        cache: of the prompts, complete.
        inputs: of the objective, without a student.
        outputs: the model's with the cache of a student.
        rng: of the draws.
    """
    check_samples(policy)
    plan = policy.plan(cache, keep=keep)
    if not plan.scores.requires_grad:
        raise UserError("objective: samples of what is kept train scores; expected a learned scorer")
    drawn, losses = list[Plan](), list[Tensor]()
    with torch.no_grad():
        for _ in range(objective.samples):
            drawn.append(with_gumbel_noise(plan, objective.noise, rng.getrandbits(63)))
            student = policy.relax(cache, keep=keep, plan=drawn[-1])
            losses.append(objective(replace(inputs, student=outputs(student))))
    return objective.over_samples(plan, drawn, torch.stack(losses))
