"""Values of all tokens with the gradient of a sample of them."""

from typing import Any

import torch
from torch import Tensor


class _SampledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sampled: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.scale, ctx.dtype = values.shape[2] / len(slots), sampled.dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor, None]:
        (slots,) = ctx.saved_tensors
        return None, grads[0].index_select(2, slots).to(ctx.dtype) * ctx.scale, None


def sampled_gradient(values: Tensor, sampled: Tensor, slots: Tensor) -> Tensor:
    """`values` [B, H, S, F], whose gradient at `slots` [M], times S / M, is passed to `sampled` [B, H, M, F].

    An unbiased estimate of the gradient of recomputing all of `values`, where every slot is equally likely in a sample.
    """
    result: Tensor = _SampledGradient.apply(values, sampled, slots)
    return result
