"""Gradients of attention to kept entries, with respect to the mask of all entries and to the continuation."""

from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

OVERFLOW_CLIP = 4.0
"""Bound of s_j - max over the attended entries, in nats: a dominating evicted key would give an unbounded gradient."""


def mask_gradient(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    kept_gates: Tensor | None = None,
    terms: SoftmaxTerms = NO_TERMS,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward pass of `decode_attention` to the kept entries of prompts whose keys and values still exist.

    With a mask m_j on the softmax weights, 1 for kept and 0 for evicted entries,

        dL/dm_j = sum over queries i of exp(min(s_ij - top_i, 4)) exp(top_i - lse_i) <dL/do_i, v_j - o_i>

    where top_i is the largest score among the entries that query i attended to, and its sink. One pass over all of the
    prompt's entries, one over the kept ones, no tensor of size queries x entries.

    Args:
        grad: [B*C, H*G, T, D] of the output; C continuations of each of B prompts, those of one prompt adjacent.
        query, output, lse: input and results of `decode_attention`, [B*C, H*G, T, D] and [B*C, H*G, T].
        keys, values: [B, H, S, D] of the prompts.
        kept, tail, scaling: inputs of `decode_attention`: B*C*H rows and [B*C, H, M, D], all M slots in use.
        kept_gates: [N] factors of the softmax weights of the pool's entries; None: 1.
        terms: as of `decode_attention`; sinks get no gradient.

    Returns:
        Gradients of m [B, H, S] (float32), of `query`, `tail.keys` and `tail.values`.
    """
    mask, query_gradient, keys_gradient, values_gradient = implementation(
        "mask_gradient", impl, ("reference", "triton"), grad, query, keys, values, tail.keys, tail.values
    ).mask_gradient(grad, query, output, lse, keys, values, kept, tail, scaling, kept_gates, terms)
    return mask, query_gradient, keys_gradient, values_gradient
