"""Exact differentiable split of a budget: bounded logistic shares whose mean is prescribed."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ITERATIONS = 70
_EDGE = 1e-12


def allocate(logits: Tensor, mean: Tensor, low: Tensor) -> Tensor:
    """Shares `low + (1 - low) * sigmoid(logits - shift)` with the one shift per row that gives them the mean `mean`.

    The shift is found by bisection in float64; gradients are those of the solved equation, so no budget penalty is
    needed: they flow to `logits` and to `mean`, never to `low`. A constant added to a row of `logits` changes nothing.

    Args:
        logits: [B, N], N heads of all layers.
        mean: [B] mean share, within (low, 1); a value outside is moved to the nearest bound.
        low: [B] share that no head falls below.

    Returns:
        [B, N] shares, float64.
    """
    shares: Tensor = _Allocate.apply(logits.double(), mean.double(), low.double())
    return shares


class _Allocate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mean: Tensor, low: Tensor) -> Tensor:
        width = 1 - low
        open_share = ((mean - low) / width).clamp(_EDGE, 1 - _EDGE)
        # The mean of sigmoids lies between the sigmoids of the extreme logits: a bracket that needs no safety margin.
        centre = torch.logit(open_share)
        lower, upper = logits.amin(-1) - centre, logits.amax(-1) - centre
        for _ in range(_ITERATIONS):
            shift = (lower + upper) / 2
            too_much = torch.sigmoid(logits - shift[:, None]).mean(-1) > open_share
            lower, upper = torch.where(too_much, shift, lower), torch.where(too_much, upper, shift)
        soft = torch.sigmoid(logits - ((lower + upper) / 2)[:, None])
        ctx.save_for_backward(soft, width)
        return low[:, None] + width[:, None] * soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        soft, width = ctx.saved_tensors
        (grad,) = grads
        slope = soft * (1 - soft)
        value = (grad * slope).sum(-1) / slope.sum(-1).clamp_min(1e-300)
        return width[:, None] * slope * (grad - value[:, None]), value * soft.shape[-1], None
