"""Grouped-query attention of new tokens to ragged segments and a tail."""

from torch import Tensor

from learnkv.ops.decode_attention import reference
from learnkv.ops.dispatch import Impl, choose


def decode_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    start: Tensor,
    length: Tensor,
    longest: int,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens to the kept entries of the prompt and to the tail, which ends with the new tokens.

    Args:
        query: [B, H*G, T, D].
        keys, values: [N, D] pool of kept entries; row r = b * H + h of this layer owns
            `keys[start[r] : start[r] + length[r]]`. Rows may share entries (beams, forks).
        start, length: [B*H].
        longest: upper bound of `length`, known on the host.
        tail_keys, tail_values: [B, H, M, D], the last T are the new tokens.
        tail_mask: [B, 1, T, M] True where a new token sees a tail slot; None: causal, nothing padded.
        scaling: factor on query-key products.

    Returns:
        Output [B, H*G, T, D] and log-sum-exp [B, H*G, T] (float32).
    """
    choose("decode_attention", impl, ("reference",), query.is_cuda)
    return reference.decode_attention(
        query, keys, values, start, length, longest, tail_keys, tail_values, tail_mask, scaling
    )
