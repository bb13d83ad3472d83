"""Exact soft top-k: keep-probabilities of entries that sum to the budget."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ITERATIONS = 48
_EDGE = 1e-7


def soft_topk(scores: Tensor, count: Tensor, temperature: float, cost: Tensor | None = None) -> Tensor:
    """Keep-probabilities `sigmoid((scores - threshold) / temperature)` that sum to `count` along the last dimension.

    The threshold is found by bisection and gradients are those of the solved equation. They flow to the scores and to
    `count`, whose gradient is the marginal value of one more entry. Entries with score +inf are kept (probability 1),
    entries with score -inf are absent (0); neither gets a gradient.

    Args:
        scores: [..., S], float32 or float64.
        count: [...] entries to keep, protected ones included; a value outside of what is possible is moved to it.
        temperature: width of the transition in units of the scores, positive.
        cost: [..., S] positive cost of every entry; probabilities times costs then sum to `count`. None: 1.

    Returns:
        [..., S] in the dtype of `scores`.
    """
    mask: Tensor = _SoftTopK.apply(scores, count, temperature, cost)
    return mask


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, count: Tensor, temperature: float, cost: Tensor | None) -> Tensor:
        def total(part: Tensor) -> Tensor:
            return part.sum(-1) if cost is None else (part * cost).sum(-1)

        finite = torch.isfinite(scores)
        free = total(finite).clamp_min(1)
        kept_anyway = total(scores == torch.inf)
        share = ((count.to(scores.dtype) - kept_anyway) / free).clamp(_EDGE, 1 - _EDGE)
        centre = temperature * torch.logit(share)
        lower = torch.where(finite, scores, torch.inf).amin(-1) - centre
        upper = torch.where(finite, scores, -torch.inf).amax(-1) - centre
        bounded = torch.isfinite(lower)  # False in a row without a finite score
        lower, upper = torch.where(bounded, lower, 0.0), torch.where(bounded, upper, 0.0)
        target = share * free + kept_anyway
        for _ in range(_ITERATIONS):
            threshold = (lower + upper) / 2
            too_much = total(torch.sigmoid((scores - threshold[..., None]) / temperature)) > target
            lower, upper = torch.where(too_much, threshold, lower), torch.where(too_much, upper, threshold)
        soft = torch.sigmoid((scores - ((lower + upper) / 2)[..., None]) / temperature)
        ctx.save_for_backward(soft, cost)
        ctx.temperature, ctx.count_dtype = temperature, count.dtype
        return soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        soft, cost = ctx.saved_tensors
        (grad,) = grads
        slope = soft * (1 - soft)
        spent = slope if cost is None else slope * cost
        value = (grad * slope).sum(-1) / spent.sum(-1).clamp_min(torch.finfo(slope.dtype).tiny)
        price = value[..., None] if cost is None else value[..., None] * cost
        return slope * (grad - price) / ctx.temperature, value.to(ctx.count_dtype), None, None
