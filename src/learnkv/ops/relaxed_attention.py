"""Attention to the kept entries of a prompt, with a gradient for the mask of every entry."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.dispatch import Impl, resolve
from learnkv.ops.mask_gradient import mask_gradient


def relaxed_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    kept: Ragged,
    tail: Tail,
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
        kept: B*C*H rows of kept entries.
        tail: [B*C, H, M, D], all M slots in use.
        scaling: factor on query-key products.

    Returns:
        [B*C, H*G, T, D].
    """
    output: Tensor = _RelaxedAttention.apply(
        query, gates, tail.keys, tail.values, (keys, values, kept, tail.mask), scaling, resolve(impl)
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
        constants: tuple[Tensor, Tensor, Ragged, Tensor | None],
        scaling: float,
        impl: Impl,
    ) -> Tensor:
        keys, values, kept, mask = constants
        output, lse = decode_attention(query, kept, Tail(tail_keys, tail_values, mask), scaling, impl=impl)
        ctx.save_for_backward(query, output, lse, keys, values, tail_keys, tail_values, mask, *kept[:4])
        ctx.longest, ctx.spans = kept.longest, kept.spans
        ctx.scaling, ctx.impl, ctx.gate_type = scaling, impl, gates.dtype
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, output, lse, keys, values, tail_keys, tail_values, mask, *pool = ctx.saved_tensors
        kept = Ragged(pool[0], pool[1], pool[2], pool[3], ctx.longest, ctx.spans)
        tail = Tail(tail_keys, tail_values, mask)
        gates, query_gradient, *tails = mask_gradient(
            grads[0], query, output, lse, keys, values, kept, tail, ctx.scaling, impl=ctx.impl
        )
        return query_gradient, gates.to(ctx.gate_type), *tails, None, None, None
