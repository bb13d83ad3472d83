"""Gradients of attention to a part of the prompt, with respect to what was kept of it and to the continuation."""

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation

OVERFLOW_CLIP = 4.0
"""Bound of s_j - max over what was read, in nats: a dominating evicted key would give an unbounded gradient."""


def mask_gradient(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
    start: Tensor,
    length: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    kept_gates: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Backward pass of `decode_attention` to the kept entries of prompts that are still at hand.

    With a mask m_j on the softmax weights, 1 for what was kept and 0 for what was evicted,

        dL/dm_j = sum over queries i of exp(min(s_ij - top_i, 4)) exp(top_i - lse_i) <dL/do_i, v_j - o_i>

    where top_i is the largest score that query i read. One pass over all of the prompt's entries, one over what was
    kept, nothing of size queries x entries.

    Args:
        grad: [B*C, H*G, T, D] of the output; C continuations of each of B prompts, those of one prompt adjacent.
        query, output, lse: what `decode_attention` was given and gave, [B*C, H*G, T, D] and [B*C, H*G, T].
        keys, values: [B, H, S, D] of the prompts.
        kept_keys, kept_values, start, length: what it read of them: pool [N, D] and tables [B*C*H].
        tail_keys, tail_values, tail_mask, scaling: as it was given them.
        kept_gates: [N] factors of the softmax weights of the pool's entries; None: 1.

    Returns:
        Gradients of m [B, H, S] (float32), of `query`, `tail_keys` and `tail_values`.
    """
    one, two, three, four = implementation(
        "mask_gradient", impl, ("reference", "triton"), grad, query, keys, values, tail_keys, tail_values
    ).mask_gradient(
        grad,
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
        scaling,
        kept_gates,
    )
    return one, two, three, four
