"""Attention to gated entries, for training: the deployed set in the forward, a gradient for every entry."""

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation


def gated_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Attention whose softmax weight of prompt entry j is multiplied by gate m_j before normalisation.

    With gates of 0 and 1 the output is that of attention to the kept entries alone. The gradient reaches the gate of
    every entry, also of one that is evicted; there exp(s_j - max over kept) is bounded by e^4, as a dominating evicted
    key would otherwise give an unbounded gradient.

    Args:
        query: [B*C, H*G, T, D]: C continuations of each of the B prompts, continuations of one prompt adjacent.
        keys, values: [B, H, S, D] of the prompt.
        gates: [B, H, S] in [0, 1], 0 where there is no entry.
        tail_keys, tail_values: [B*C, H, M, D], the last T are the new tokens.
        tail_mask: [B*C, 1, T, M] True where a new token sees a tail slot; None: causal, nothing padded.
        scaling: factor on query-key products.

    Returns:
        [B*C, H*G, T, D].
    """
    inputs = (query, keys, values, gates, tail_keys, tail_values)
    output: Tensor = implementation("gated_attention", impl, ("reference",), *inputs).gated_attention(
        *inputs, tail_mask, scaling
    )
    return output
