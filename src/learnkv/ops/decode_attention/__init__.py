"""Grouped-query attention of new tokens to ragged segments and a tail."""

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from learnkv.ops.arguments import Codes, Pages, Ragged, Tail, Tier
from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms


@overload
def decode_attention(
    query: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    pages: Pages | None = None,
    tiers: Sequence[Tier] = (),
    terms: SoftmaxTerms = NO_TERMS,
    *,
    needs_lse: Literal[True] = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]: ...


@overload
def decode_attention(
    query: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    pages: Pages | None = None,
    tiers: Sequence[Tier] = (),
    terms: SoftmaxTerms = NO_TERMS,
    *,
    needs_lse: bool,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]: ...


def decode_attention(
    query: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    pages: Pages | None = None,
    tiers: Sequence[Tier] = (),
    terms: SoftmaxTerms = NO_TERMS,
    *,
    needs_lse: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of T new tokens to the kept entries of the prompt and to the tail, which ends with the new tokens.

    Args:
        query: [B, H*G, T, D].
        kept: B*H rows of kept entries.
        tail: [B, H, M, D].
        scaling: factor on query-key products.
        pages: for T = 1, the pages that are read; None: everything is read.
        tiers: further kept entries of the same rows, stored in fewer bits; without pages. The kernel reads tiers that
            share one tensor `key_basis` and one `value_basis`; others are read by the reference.
        terms: soft cap of all logits, and sinks, which join every query's softmax and its log-sum-exp once.
        needs_lse: whether the log-sum-exp is wanted; without it, None may stand in its place.

    Returns:
        Output [B, H*G, T, D] and log-sum-exp [B, H*G, T] (float32).
    """
    assert pages is None or query.shape[2] == 1, "pages are chosen for one token"
    assert pages is None or not tiers, "pages are of entries at full precision"
    inputs = (query, kept.keys, kept.values, tail.keys, tail.values, *_tensors(tiers))
    chosen = implementation("decode_attention", impl, ("reference", "triton"), *inputs, lacks=_lacks(tiers))
    output, lse = chosen.decode_attention(query, kept, tail, scaling, pages, tiers, terms, needs_lse)
    return output, lse


def _tensors(tiers: Sequence[Tier]) -> list[Tensor]:
    return [part.codes if isinstance(part, Codes) else part for tier in tiers for part in (tier.keys, tier.values)]


def _lacks(tiers: Sequence[Tier]) -> str | None:
    """What the kernel does not have: it turns queries and outputs once for all tiers."""
    for name in ("key_basis", "value_basis"):
        bases = [getattr(tier, name) for tier in tiers]
        if len({None if basis is None else (basis.data_ptr(), basis.shape) for basis in bases}) > 1:
            return f"tiers with more than one {name}"
    return None
