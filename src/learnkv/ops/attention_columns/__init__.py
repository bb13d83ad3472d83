"""Sum or maximum of the attention weights that every cache entry gets from a number of queries."""

from typing import Literal

from torch import Tensor

from learnkv.ops.dispatch import Impl, implementation
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms


def attention_columns(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    terms: SoftmaxTerms = NO_TERMS,
    reduce: Literal["sum", "max"] = "sum",
    query_weight: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Sum or maximum of attention weights over all queries: [B, H, G, S] float32, 0 where an entry is not valid.

    A query attends to the valid entries up to its own position, with a softmax in float32. The matrix of weights is
    computed block by block, so that there may be as many queries as tokens of a long prompt.

    Args:
        queries: [B, H*G, T, D] after RoPE; query heads h*G .. h*G+G-1 read kv head h.
        keys: [B, H, S, D] after RoPE.
        query_positions: [B, T] prompt position of each query, negative where it is padding.
        positions: [B, H, S] prompt position of each entry.
        valid: [B, H, S] bool, False where there is no entry.
        scaling: factor on query-key products.
        terms: soft cap and sinks of the model.
        reduce: over the queries.
        query_weight: [B, T] float32, not negative, multiplies a query's attention; None: 1.
    """
    assert queries.shape[1] % keys.shape[1] == 0, (queries.shape, keys.shape)
    columns: Tensor = implementation("attention_columns", impl, ("reference",), queries, keys).attention_columns(
        queries,
        keys,
        query_positions=query_positions,
        positions=positions,
        valid=valid,
        scaling=scaling,
        terms=terms,
        reduce=reduce,
        query_weight=query_weight,
    )
    return columns
