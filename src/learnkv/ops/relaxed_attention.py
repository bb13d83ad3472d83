"""Attention to the kept entries of a prompt, with a gradient for the mask of every entry."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.decode_attention import decode_attention
from learnkv.ops.dispatch import Impl, resolve
from learnkv.ops.evicted_moments import merged_attention
from learnkv.ops.mask_gradient import mask_gradient
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms


def relaxed_attention(
    query: Tensor,
    keys: Tensor | Sequence[Tensor],
    values: Tensor | Sequence[Tensor],
    gates: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    others: tuple[Tensor, Tensor] | None = None,
    terms: SoftmaxTerms = NO_TERMS,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """`decode_attention` to the kept entries; the gradient also reaches the gate of every entry of the prompt.

    Gates are not read: kept entries count as 1, evicted ones as 0, and a gate gets the gradient of that mask.

    With M levels of precision there is a gate for the step of every entry to each level. Its gradient is the change of
    the loss from the level below to this one, both to first order in the entry's mask: with w_m = exp(s_m - lse),

        sum over queries of <dL/do, w_m (v_m - o) - w_(m-1) (v_(m-1) - o)>,  w_0 = 0

    Differences of codes are not linearised, as those of two bits are large.

    Args:
        query: [B*C, H*G, T, D]: C continuations of each of the B prompts, continuations of one prompt adjacent.
        keys, values: [B, H, S, D] of the prompts, which get no gradient; with levels M of them, as each level stores
            them.
        gates: [B, H, S]; with levels [M, B, H, S].
        kept: B*C*H rows of kept entries.
        tail: [B*C, H, M, D], all M slots in use.
        scaling: factor on query-key products.
        others: attention [B*C, H*G, T, D] to further entries and its log-sum-exp [B*C, H*G, T], which get gradients.
        terms: soft cap of the logits, and sinks, which get no gradient.

    Returns:
        [B*C, H*G, T, D].
    """
    stored = ((keys,), (values,)) if isinstance(keys, Tensor) else (tuple(keys), tuple(values))
    output: Tensor = _RelaxedAttention.apply(
        query,
        gates,
        tail.keys,
        tail.values,
        *(others or (None, None)),
        (*stored, kept, tail.mask),
        (scaling, terms),
        resolve(impl),
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
        other: Tensor | None,
        other_lse: Tensor | None,
        constants: tuple[tuple[Tensor, ...], tuple[Tensor, ...], Ragged, Tensor | None],
        logits: tuple[float, SoftmaxTerms],
        impl: Impl,
    ) -> Tensor:
        (keys, values, kept, mask), (scaling, terms) = constants, logits
        tail = Tail(tail_keys, tail_values, mask)
        output, lse = decode_attention(query, kept, tail, scaling, terms=terms, impl=impl)
        if other is not None and other_lse is not None:
            # A softmax over both sets: with its output and log-sum-exp the gradients below are those of the union.
            output, lse = merged_attention(output, lse, other, other_lse)
        saved = (query, output, lse, other, other_lse, tail_keys, tail_values, mask)
        ctx.save_for_backward(*saved, *kept[:4], *keys, *values)
        ctx.longest, ctx.spans = kept.longest, kept.spans
        ctx.scaling, ctx.terms, ctx.impl, ctx.gate_type, ctx.by_level = (
            scaling,
            terms,
            impl,
            gates.dtype,
            gates.dim() == 4,
        )
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, output, lse, other, other_lse, tail_keys, tail_values, mask, *pool = ctx.saved_tensors
        kept = Ragged(pool[0], pool[1], pool[2], pool[3], ctx.longest, ctx.spans)
        tail, levels = Tail(tail_keys, tail_values, mask), (len(pool) - 4) // 2
        results = [
            mask_gradient(
                grads[0], query, output, lse, keys, values, kept, tail, ctx.scaling, terms=ctx.terms, impl=ctx.impl
            )
            for keys, values in zip(pool[4 : 4 + levels], pool[4 + levels :], strict=True)
        ]
        _, query_gradient, *tails = results[0]  # these are the same for all levels
        gates = torch.stack([masks for masks, *_ in results])
        gates = gates.diff(dim=0, prepend=torch.zeros_like(gates[:1])) if ctx.by_level else gates[0]
        of_others: tuple[Tensor | None, Tensor | None] = (None, None)
        if other is not None:
            weight = (other_lse - lse.masked_fill(lse == -torch.inf, 0)).exp().unsqueeze(-1)
            of_others = weight * grads[0], (weight * grads[0] * (other - output)).sum(-1)
        return query_gradient, gates.to(ctx.gate_type), *tails, *of_others, None, None, None
