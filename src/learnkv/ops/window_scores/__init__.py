"""Attention of the last prompt queries to every cache entry, pooled over neighbours and query heads."""

from typing import Literal

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.pool_apart import Pooling
from learnkv.ops.reduce_group import GroupReduce
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

WindowReduce = Literal["mean", "sum"]


def window_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    kernel_size: int,
    pooling: Pooling = "avg",
    window_reduce: WindowReduce = "mean",
    group_reduce: GroupReduce | Literal["none"] = "mean",
    group_first: bool = True,
    terms: SoftmaxTerms = NO_TERMS,
    lse: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Scores [B, H, S] float32, or [B, H, G, S] by query head; 0 where an entry is not valid.

    A query attends to the valid entries up to its own position, those of the window included, with a softmax in
    float32. The weights are reduced over the queries of the window, then over the G query heads of a kv head and over
    neighbouring slots, in the order of `group_first`.

    The entries before the window ("the past") are pooled as in the published methods: beyond the first and the last of
    them are zeros, counted in the mean, or -inf for the maximum. So are padding and evicted entries, so a left-padded
    row has the scores of the row alone.

    Only some queries attend to an entry of the window itself. A plain mean or sum would rank these by the number of
    later queries, so they get the mean over the queries that attend to them (times the number of queries for a sum).
    They are pooled among themselves, as their high weights would raise the scores of the last entries of the past.

    Args:
        queries: [B, H*G, W, D] after RoPE; query heads h*G .. h*G+G-1 read kv head h.
        keys: [B, H, S, D] after RoPE, slots in position order.
        query_positions: [B, W] prompt position of each query, negative where it is padding.
        positions, valid: [B, H, S] prompt position of each entry; False where there is none.
        scaling, terms: factor on query-key products; soft cap and sinks of the model.
        kernel_size, pooling: mean or maximum over an odd number of slots.
        window_reduce: mean or sum over the queries of the window.
        group_reduce: mean, maximum or sum over the query heads of a kv head; none: no reduction.
        group_first: reduce heads before pooling slots.
        lse: [B, H*G, W] log-sum-exp of every query's masked logits and its sink; None: one more pass computes it.
    """
    assert (kernel_size % 2, queries.shape[1] % keys.shape[1]) == (1, 0), (kernel_size, queries.shape, keys.shape)
    scores: Tensor = implementation("window_scores", impl, ("reference", "triton"), queries, keys).window_scores(
        queries,
        keys,
        query_positions=query_positions,
        positions=positions,
        valid=valid,
        scaling=scaling,
        kernel_size=kernel_size,
        pooling=pooling,
        window_reduce=window_reduce,
        group_reduce=group_reduce,
        group_first=group_first,
        terms=terms,
        lse=lse,
    )
    return scores
