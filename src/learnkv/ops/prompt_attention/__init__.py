"""Attention while a prompt is read, of models whose softmax sdpa does not compute."""

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.softmax_terms import SoftmaxTerms


def prompt_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    terms: SoftmaxTerms,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Attention of T tokens to all that was read, which ends with them; a softmax in float32, queries block by block.

    Args:
        query: [B, H*G, T, D].
        keys, values: [B, H, S, D], S >= T.
        mask: [B or 1, 1, T, S] True where a token attends to an entry; None: to those up to itself. A token that
            attends to nothing gets 0.
        scaling: factor on query-key products.
        terms: soft cap and sinks.

    Returns:
        [B, H*G, T, D].
    """
    output: Tensor = implementation(
        "prompt_attention", impl, ("reference", "triton"), query, keys, values
    ).prompt_attention(query, keys, values, mask, scaling, terms)
    return output


def blocks(tokens: int, entries: int, size: int, mask: Tensor | None) -> list[tuple[slice, int, Tensor | None]]:
    """Blocks of queries, how many entries each may attend to, and its part of the mask."""
    parts = []
    for begin in range(0, tokens, size):
        block = slice(begin, min(begin + size, tokens))
        seen = entries if mask is not None else entries - tokens + block.stop
        parts.append((block, seen, None if mask is None else mask[:, :, block]))
    return parts
