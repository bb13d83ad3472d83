"""Training of policies with a precision: budgets in bytes, levels that a step tries, distortions to begin with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from lightning import LightningModule
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.stored_prompt import stored_prompt
from learnkv.core.observation import Observation
from learnkv.core.plan import Plan
from learnkv.ops.softmax_terms import with_sinks
from learnkv.ops.window_attention import window_logits
from learnkv.policy.policy import Policy
from learnkv.precision.learned import LearnedPrecision


class BudgetArguments(TypedDict, total=False):
    """A budget as arguments of a policy's methods."""

    keep: float
    bytes: float


def budget_arguments(policy: Policy, fraction: float) -> BudgetArguments:
    """A fraction of the entries; of a policy with a precision, one of the 16-bit cache's bytes."""
    return {"keep": fraction} if policy.precision is None else {"bytes": fraction}


def spent_over_asked(policy: Policy, student: CompressedCache, plan: Plan | None, fraction: float) -> float:
    """What a student spends over what was requested, mean over its rows."""
    spend = None if policy.precision is None else policy.byte_budget(student, fraction)
    if spend is None or plan is None or plan.levels is None:
        return sum(student.spent) / len(student.spent) / fraction
    asked = zip(spend.row_nbytes(plan.levels), spend.asked, strict=True)
    return sum(size / most for size, most in asked) / len(spend.asked)


@contextmanager
def trying_levels(policy: Policy, probability: float, seed: int) -> Iterator[None]:
    """Let every head choose among some levels only, drawn anew, with this probability.

    So levels that are of no use yet meet the others, too, and get a gradient.
    """
    precision = policy.precision
    if not isinstance(precision, LearnedPrecision) or probability == 0:
        yield
        return
    shape = (*precision.shape, len(precision.menu))
    generator = torch.Generator().manual_seed(seed)
    available = torch.rand(shape, generator=generator) < 0.5
    certain = torch.randint(shape[-1], shape[:-1], generator=generator)
    available.scatter_(-1, certain.unsqueeze(-1), True)
    free = torch.rand(shape[:-1], generator=generator) >= probability
    precision.available = available | free.unsqueeze(-1)
    try:
        yield
    finally:
        precision.available = None


@torch.no_grad()
def measure_distortion(cache: CompressedCache, precision: LearnedPrecision) -> tuple[Tensor, Tensor]:
    """Squared changes of attention outputs [L, H, M] by storing entries at each level, and [L, H, 1] by evicting them.

    Over the last queries of the prompts and all entries, one entry at a time: with weights w and outputs o, an entry at
    level m changes an output by w_m (v_m - o) - w (v - o), its eviction by -w (v - o).
    """
    sums = [_layer_distortion(layer, precision, idx) for idx, layer in enumerate(cache.compressed_layers())]
    levels, evicted = (torch.stack(part) for part in zip(*sums, strict=True))
    return levels, evicted


def measure_first(module: LightningModule, cache: CompressedCache) -> None:
    """Before the first step, where the policy's precision begins with measured distortions: mean over all processes."""
    precision = module.policy.precision
    if isinstance(precision, LearnedPrecision) and not precision.measured:
        reduce = module.trainer.strategy.reduce
        levels, evicted = (reduce(part, reduce_op="mean") for part in measure_distortion(cache, precision))
        precision.set_distortions(levels / evicted.clamp_min(torch.finfo(evicted.dtype).tiny))


def _layer_distortion(layer: CompressedLayer, precision: LearnedPrecision, idx: int) -> tuple[Tensor, Tensor]:
    obs = layer.observation()
    logits, lse = _logits(obs, obs.keys)
    weights = (logits - lse).exp()
    outputs = (weights @ obs.values.float()).unsqueeze(-2)
    pull = _pull(weights, obs.values, outputs)
    changes = []
    for at_level in stored_prompt(layer.prompt, precision.levels, idx):
        other = (_logits(obs, at_level.keys)[0] - lse).exp()
        changes.append((_pull(other, at_level.values, outputs) - pull).square().sum((0, 2, 3, 4)))
    return torch.stack(changes, -1), pull.square().sum((0, 2, 3, 4)).unsqueeze(-1)


def _logits(obs: Observation, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scaled products [B, H, G*W, S] of the last queries, and their log-sum-exp [B, H, G*W, 1]."""
    parts = {"query_positions": obs.query_positions, "positions": obs.positions, "valid": obs.valid}
    logits = window_logits(obs.queries, keys, **parts, scaling=obs.scaling, terms=obs.terms)[0].flatten(2, 3)
    sinks = obs.terms.of_rows(1, keys.shape[1], obs.queries.shape[2])
    lse = with_sinks(logits.logsumexp(-1, keepdim=True), sinks)
    return logits, lse.masked_fill(lse == -torch.inf, torch.inf)  # padding attends to nothing


def _pull(weights: Tensor, values: Tensor, outputs: Tensor) -> Tensor:
    """W (v - o) [B, H, G*W, S, D] of every query and entry."""
    return weights.unsqueeze(-1) * (values.float().unsqueeze(2) - outputs)
