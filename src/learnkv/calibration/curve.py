"""LU-KV's budget curve: evicted fraction of each head at every global target."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.calibration.answering import answer_observations, attention
from learnkv.calibration.trials import Trial
from learnkv.formats.lukv import TARGETS
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy

BINS = TARGETS + 1


@torch.no_grad()
def budget_curve(model: Any, trials: Iterable[Trial], policy: Policy) -> Tensor:
    """The curve [99, L, H] float32 for the order of a policy's scorer: budgets of equal marginal utility.

    The utility of an entry is its attention weight, averaged over the queries of the true answer and the heads of the
    group. In each head, entries are ordered by the scores of `policy`; the utility of every further percent, averaged
    over trials, is made non-increasing (pool adjacent violators), and the percents of all heads are kept in order of
    utility until the target is met.
    """
    gains: list[Tensor] = []
    for trial in trials:
        context = trial.context.shape[1]
        order = policy.plan(prefill(model, trial.context.to(model.device), policies=[policy]), 0.5).scores
        order = order[:, 0].argsort(dim=-1, descending=True, stable=True)  # [L, H, S]
        observations = answer_observations(model, torch.cat([trial.context, trial.question], 1), trial.answer)
        utility = torch.stack([attention(obs).mean((1, 2))[:, :context] for obs in observations])
        total = torch.nn.functional.pad(utility.gather(-1, order.to(utility.device)).double().cumsum(-1), (1, 0))
        ends = (torch.arange(BINS + 1, device=utility.device) * context).float() / BINS
        low, part = ends.floor().long(), ends - ends.floor()
        high = (low + 1).clamp(max=context)
        gains.append((total[..., low] * (1 - part) + total[..., high] * part).diff(dim=-1).cpu())
    return curve_of(torch.stack(gains).mean(0))


def curve_of(gains: Tensor) -> Tensor:
    """The curve [99, L, H] of utilities [L, H, 100] per percent kept."""
    layers, heads, bins = gains.shape
    utility = torch.tensor([_non_increasing(row) for row in gains.flatten(0, 1).tolist()], dtype=torch.float64)
    # Percents of equal utility: lower percents of all heads first, not all percents of the first head.
    order = utility.T.flatten().argsort(descending=True, stable=True) % (layers * heads)
    curve = torch.empty(TARGETS, layers * heads, dtype=torch.float32)
    for target in range(TARGETS):
        kept = order[: (bins - 1 - target) * layers * heads].bincount(minlength=layers * heads)
        curve[target] = 1 - kept / bins
    return curve.view(TARGETS, layers, heads)


def _non_increasing(gains: list[float]) -> list[float]:
    """Isotonic regression: the non-increasing sequence with the least squared error."""
    pools: list[tuple[float, int]] = []
    for gain in gains:
        mean, count = gain, 1
        while pools and pools[-1][0] < mean:
            last_mean, last_count = pools.pop()
            mean, count = (mean * count + last_mean * last_count) / (count + last_count), count + last_count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
