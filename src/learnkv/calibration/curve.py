"""What fraction of each head to evict, for every global target."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.calibration.answering import answering, attention
from learnkv.calibration.trials import Trial
from learnkv.formats.lukv import TARGETS
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy

BINS = TARGETS + 1


@torch.no_grad()
def budget_curve(model: Any, trials: Iterable[Trial], policy: Policy) -> Tensor:
    """The curve [99, L, H] float32 for the order of a policy's scorer: budgets of equal marginal utility.

    The utility of an entry is the attention that the queries of the true answer give to it, the mean over them and the
    heads of the group. In each head, entries stand in the order in which `policy` would keep them; the utility of every
    further percent, averaged over trials, is made to fall (pooling adjacent violators), and the percents of all heads
    are kept from the most useful one down until the target is met.
    """
    gains: list[Tensor] = []
    for trial in trials:
        context = trial.context.shape[1]
        order = policy.plan(prefill(model, trial.context.to(model.device), policies=[policy]), 0.5).scores
        order = order[:, 0].argsort(dim=-1, descending=True, stable=True)  # [L, H, S]
        before = torch.cat([trial.context, trial.question], 1)
        useful = torch.stack(
            [attention(obs).mean((1, 2))[:, :context] for obs in answering(model, before, trial.answer)]
        )
        rising = torch.nn.functional.pad(useful.gather(-1, order.to(useful.device)).double().cumsum(-1), (1, 0))
        ends = (torch.arange(BINS + 1, device=useful.device) * context) / BINS
        low, part = ends.floor().long(), ends - ends.floor()
        high = (low + 1).clamp(max=context)
        gains.append((rising[..., low] * (1 - part) + rising[..., high] * part).diff(dim=-1).cpu())
    return curve_of(torch.stack(gains).mean(0))


def curve_of(gains: Tensor) -> Tensor:
    """The curve of utilities [L, H, 100] per percent kept."""
    layers, heads, bins = gains.shape
    fallen = torch.tensor([_falling(row) for row in gains.flatten(0, 1).tolist()], dtype=torch.float64)
    # Percents that are equally useful are kept the lowest percent first, not all those of the first head.
    order = fallen.T.flatten().argsort(descending=True, stable=True) % (layers * heads)
    curve = torch.empty(TARGETS, layers * heads)
    for target in range(TARGETS):
        kept = order[: (bins - 1 - target) * layers * heads].bincount(minlength=layers * heads)
        curve[target] = 1 - kept / bins
    return curve.view(TARGETS, layers, heads)


def _falling(gains: list[float]) -> list[float]:
    """The nearest numbers, in squares, of which none is above the one before."""
    pools: list[tuple[float, int]] = []
    for gain in gains:
        mean, count = gain, 1
        while pools and pools[-1][0] < mean:
            other, others = pools.pop()
            mean, count = (mean * count + other * others) / (count + others), count + others
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]
