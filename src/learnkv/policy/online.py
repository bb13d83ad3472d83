"""Eviction while tokens are added: what is retained and the tail are judged as a prompt is."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.merge_tail import merge_tail
from learnkv.cache.schedule import EvictionSchedule
from learnkv.core.observation import CaptureSpec
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.ops.device import upload
from learnkv.policy.budget import entries_to_keep

if TYPE_CHECKING:
    from learnkv.policy.policy import Policy


def check_judge(evict_interval: int, judge: Scorer | None) -> None:
    """Raise where a scorer cannot judge tokens that come after the prompt."""
    if evict_interval < 0:
        raise UserError(
            f"evict_interval={evict_interval}: expected a number of tokens, 0 to keep all that come after the prompt"
        )
    if evict_interval and judge is not None and (judge.needs or judge.extra_passes):
        raise UserError(
            f"evict_interval={evict_interval}: {type(judge).__name__} reads of a prompt what is not held of "
            "later tokens; expected another scorer as decode"
        )


def schedule_eviction(
    policy: "Policy",
    cache: CompressedCache,
    keep: float | None,
    budget: float | None,
    renew: Callable[[CompressedCache], None] | None = None,
) -> EvictionSchedule | None:
    """What a cache that is about to be compressed will hold to; None for a policy that leaves later tokens alone.

    Args:
        renew: what a student is brought back to its budget by.
    """
    judge = policy.decode or policy.scorer
    if not policy.evict_interval or judge is None:
        return None
    heads = _heads(cache)
    held = entries_to_keep(cache, heads, keep, budget)
    most = held if budget is None else [round(budget * heads)] * len(held)
    live = CaptureSpec(max(judge.window, policy.allocator.window), statistics=judge.decode_capture)
    again = renew or partial(recompress, policy)
    return EvictionSchedule(policy.evict_interval, tuple(most), tuple(held), live, again, student=renew is not None)


@torch.no_grad()
def recompress(policy: "Policy", cache: CompressedCache) -> None:
    """Join the tail to what is retained and evict until every row is within its budget.

    Once a row had to evict, its heads keep the budgets that they were given then. So each layer is judged and evicted
    by itself. As long as a row holds everything, the allocator is asked anew.
    """
    assert cache.budgets is not None
    judge, said, total, protected, evicted = _joined(policy, cache)
    longest, of_layer = (part.tolist() for part in (cache.budgets.amax((1, 2)), cache.budgets.sum((1, 2))))
    if all(evicted):
        for at, budgets in enumerate(cache.budgets):
            _reopen(cache, at, longest[at], said)
            obs = policy.obs(cache, at, total)
            scores = policy.refine(judge, obs, policy.judge(judge, obs, protected).scores, budgets)
            mine = budgets.unsqueeze(0).to(scores.device)
            cache.evict(scores.unsqueeze(0), mine, of_layer[at], at, policy.rerotate)
        return
    for at in range(len(of_layer)):
        _reopen(cache, at, max(longest), said)
    observations = [policy.obs(cache, at, total) for at in range(len(of_layer))]
    plan = policy.plan_within(cache, observations, judge, total, protected, evicted)
    cache.evict(plan.scores, plan.budgets, plan.total, rerotate=policy.rerotate)
    cache.budgets = plan.budgets


def relax_again(policy: "Policy", temperature: float, student: CompressedCache) -> None:
    """What `recompress` does, of a student: nothing is freed, and what is kept or evicted now has a gradient.

    Of what was evicted before nothing can come back, and has a gradient, and keys and values of the tail are taken as
    they are: what a token says trains the latest eviction before it.
    """
    schedule, budgets = student.schedule, student.budgets
    assert schedule is not None and schedule.wanted is not None and budgets is not None
    judge, said, total, protected, evicted = _joined(policy, student)
    longest = int(budgets.max())
    for at in range(len(budgets)):
        _reopen(student, at, longest, said)
    observations = [policy.obs(student, at, total) for at in range(len(budgets))]
    plan = policy.plan_within(student, observations, judge, total, protected, evicted)
    decided = upload(evicted, plan.wanted.device).view(1, -1, 1)
    policy.hold(student, replace(plan, wanted=torch.where(decided, schedule.wanted, plan.wanted)), temperature)


def _joined(policy: "Policy", cache: CompressedCache) -> tuple[Scorer, Tensor, list[int], list[int], list[bool]]:
    """Count the tail among what is judged. Returns who judges, the tail's positions [B, M], and of each row how many
    entries it may hold, how many per head are protected, and whether it has evicted anything before."""
    schedule, judge, heads = cache.schedule, policy.decode or policy.scorer, _heads(cache)
    assert schedule is not None and judge is not None
    evicted = [kept < n * heads for kept, n in zip(schedule.held, cache.lengths, strict=True)]
    said, new = _join_tail(cache)
    total = [
        min(most, kept + more * heads) for most, kept, more in zip(schedule.budget, schedule.held, new, strict=True)
    ]
    protected = [
        min(policy.sinks + policy.recent, most // (2 * heads), n)
        for most, n in zip(schedule.budget, cache.lengths, strict=True)
    ]
    cache.schedule = replace(schedule, held=tuple(total))
    return judge, said, total, protected, evicted


def _reopen(cache: CompressedCache, at: int, longest: int, said: Tensor) -> None:
    layer = cache.compressed_layers()[at]
    merge_tail(layer, longest, said.to(layer.device))


def _join_tail(cache: CompressedCache) -> tuple[Tensor, list[int]]:
    """Count the tail among what budgets speak of; returns its positions [B, M], -1 for padding, and its tokens."""
    cache.tail_mask = said = cache.is_token()
    base = upload(cache.prompt_lengths, said.device).unsqueeze(-1)
    begin = said.shape[1] - cache.tail_length
    positions = torch.where(said, base + said.cumsum(-1) - 1, -1)[:, begin:]
    new = said[:, begin:].sum(-1).tolist()
    cache.covered = [known + more for known, more in zip(cache.lengths, new, strict=True)]
    return positions, new


def _heads(cache: CompressedCache) -> int:
    layers = cache.compressed_layers()
    return layers[0].heads * len(layers)
