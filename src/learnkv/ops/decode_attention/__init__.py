"""Grouped-query attention of new tokens to ragged segments and a tail."""

from collections.abc import Sequence

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation


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
    tail_length: Tensor | None = None,
    pages: Tensor | None = None,
    page_size: int = 0,
    *,
    spans: Sequence[tuple[int, int]] | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of T new tokens to the kept entries of the prompt and to the tail, which ends with the new tokens.

    Args:
        query: [B, H*G, T, D].
        keys, values: [N, D] pool of kept entries; row r = b * H + h of this layer owns
            `keys[start[r] : start[r] + length[r]]`. Rows may share entries (beams, forks).
        start, length: [B*H].
        longest: upper bound of `length`, known on the host.
        tail_keys, tail_values: [B, H, M, D], M >= T; the last T in use are the new tokens.
        tail_mask: [B, 1, T, M] True where a new token sees a tail slot; None: causal, nothing padded.
        scaling: factor on query-key products.
        tail_length: [1] integer on the device, slots of the tail in use, where it has a fixed capacity M (a CUDA graph
            for the whole generation); the others are not read. None: all M.
        pages: [B*H, N] integers, or [B*H*G, N] where every query head has a list of its own: the pages that are read,
            -1 for none; for T = 1. Page p holds entries p * page_size … (p + 1) * page_size - 1 of a row, those of its
            segment first, then the slots of the tail that the token sees. None: everything is read.
        page_size: entries of a page.
        spans: (start, length) of every row where the host knows them. Kernels do not ask; without them the reference
            reads both tables, which is a host sync on a GPU.

    Returns:
        Output [B, H*G, T, D] and log-sum-exp [B, H*G, T] (float32).
    """
    assert pages is None or query.shape[2] == 1, "pages are chosen for one token"
    inputs = (query, keys, values, tail_keys, tail_values)
    output, lse = implementation("decode_attention", impl, ("reference", "triton"), *inputs).decode_attention(
        query,
        keys,
        values,
        start,
        length,
        longest,
        tail_keys,
        tail_values,
        tail_mask,
        scaling,
        tail_length,
        pages,
        page_size,
        spans,
    )
    return output, lse
