"""Attention to softly gated entries, for training: every entry counts in the forward pass as much as its gate."""

from torch import Tensor

from learnkv.ops.arguments import Tail
from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms


def gated_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    tail: Tail,
    scaling: float,
    terms: SoftmaxTerms = NO_TERMS,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Attention whose softmax weight of prompt entry j is multiplied by gate m_j before normalisation.

    With gates of 0 and 1 the output is that of attention to the kept entries alone, and the gradients are those of
    `relaxed_attention`, which does not read evicted entries in the forward pass. The gradient reaches the gate of every
    entry; there exp(s_j - max over i of (s_i + log m_i)), the sink among the i, is bounded by e^4.

    Args:
        query: [B*C, H*G, T, D]: C continuations of each of the B prompts, continuations of one prompt adjacent.
        keys, values: [B, H, S, D] of the prompt; only the reference computes their gradients.
        gates: [B, H, S] in [0, 1], 0 where there is no entry.
        tail: [B*C, H, M, D], all M slots in use.
        scaling: factor on query-key products.
        terms: soft cap and sinks, which get no gradient.

    Returns:
        [B*C, H*G, T, D].
    """
    output: Tensor = implementation("gated_attention", impl, ("reference", "triton"), keys, values).gated_attention(
        query, keys, values, gates, tail, scaling, terms
    )
    return output
