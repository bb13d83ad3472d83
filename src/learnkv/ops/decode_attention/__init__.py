"""Grouped-query attention of new tokens to ragged segments and a tail."""

from torch import Tensor

from learnkv.ops.arguments import Pages, Ragged, Tail
from learnkv.ops.dispatch import Impl, implementation


def decode_attention(
    query: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    pages: Pages | None = None,
    *,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens to the kept entries of the prompt and to the tail, which ends with the new tokens.

    Args:
        query: [B, H*G, T, D].
        kept: B*H rows of kept entries.
        tail: [B, H, M, D].
        scaling: factor on query-key products.
        pages: for T = 1, the pages that are read; None: everything is read.

    Returns:
        Output [B, H*G, T, D] and log-sum-exp [B, H*G, T] (float32).
    """
    assert pages is None or query.shape[2] == 1, "pages are chosen for one token"
    inputs = (query, kept.keys, kept.values, tail.keys, tail.values)
    output, lse = implementation("decode_attention", impl, ("reference", "triton"), *inputs).decode_attention(
        query, kept, tail, scaling, pages
    )
    return output, lse
