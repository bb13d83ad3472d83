"""Attention to softly gated entries, for training: every entry in the forward as much as its gate lets it."""

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

    With gates of 0 and 1 the output is that of attention to the kept entries alone, and the gradients are those of
    `relaxed_attention`, which does not have to read what it does not keep. The gradient reaches the gate of every
    entry; there exp(s_j - max over i of (s_i + log m_i)) is bounded by e^4.

    Args:
        query: [B*C, H*G, T, D]: C continuations of each of the B prompts, continuations of one prompt adjacent.
        keys, values: [B, H, S, D] of the prompt; only the reference has their gradients.
        gates: [B, H, S] in [0, 1], 0 where there is no entry.
        tail_keys, tail_values: [B*C, H, M, D], the last T are the new tokens.
        tail_mask: [B*C, 1, T, M] True where a new token sees a tail slot; None: causal, nothing padded.
        scaling: factor on query-key products.

    Returns:
        [B*C, H*G, T, D].
    """
    output: Tensor = implementation("gated_attention", impl, ("reference", "triton"), keys, values).gated_attention(
        query, keys, values, gates, tail_keys, tail_values, tail_mask, scaling
    )
    return output
