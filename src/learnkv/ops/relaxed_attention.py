"""Attention to what was kept of a prompt, with a gradient for the mask of everything that was not."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.dispatch import Impl, meant
from learnkv.ops.mask_gradient import mask_gradient


def relaxed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
    start: Tensor,
    length: Tensor,
    longest: int,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """`decode_attention` to the kept entries; the gradient also reaches the gate of every entry of the prompt.

    Gates are not read: kept entries count as 1, evicted ones as 0, and a gate gets the gradient of that mask.

    Args:
        query: [B*C, H*G, T, D]: C continuations of each of the B prompts, continuations of one prompt adjacent.
        keys, values: [B, H, S, D] of the prompts, which get no gradient.
        gates: [B, H, S].
        kept_keys, kept_values, start, length, longest: pool [N, D] and tables [B*C*H] of what was kept.
        tail_keys, tail_values: [B*C, H, M, D], the last T are the new tokens.
        tail_mask: [B*C, 1, T, M] True where a new token sees a tail slot; None: causal, nothing padded.
        scaling: factor on query-key products.

    Returns:
        [B*C, H*G, T, D].
    """
    output: Tensor = _RelaxedAttention.apply(
        query,
        gates,
        tail_keys,
        tail_values,
        (keys, values, kept_keys, kept_values, start, length, tail_mask),
        longest,
        scaling,
        meant(impl),
    )
    return output


class _RelaxedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        gates: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        held: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
        longest: int,
        scaling: float,
        impl: Impl,
    ) -> Tensor:
        _, _, kept_keys, kept_values, start, length, tail_mask = held
        output, lse = decode_attention(
            query, kept_keys, kept_values, start, length, longest, tail_keys, tail_values, tail_mask, scaling, impl=impl
        )
        ctx.save_for_backward(query, tail_keys, tail_values, output, lse, *held)
        ctx.scaling, ctx.impl, ctx.gate_type = scaling, impl, gates.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, tail_keys, tail_values, output, lse, *held = ctx.saved_tensors
        keys, values, kept_keys, kept_values, start, length, tail_mask = held
        gates, query_gradient, *tails = mask_gradient(
            grads[0],
            query,
            output,
            lse,
            keys,
            values,
            kept_keys,
            kept_values,
            start,
            length,
            tail_keys,
            tail_values,
            tail_mask,
            ctx.scaling,
            impl=ctx.impl,
        )
        return query_gradient, gates.to(ctx.gate_type), *tails, None, None, None, None
