"""Mean and covariance of a model's queries before RoPE."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy
from learnkv.scorers import ExpectedAttention
from learnkv.scorers.query_moments import QueryMoments


@torch.no_grad()
def query_moments(model: Any, contexts: Iterable[Tensor], sinks: int = 4) -> dict[str, Tensor]:
    """`mean` [L, H*G, D] and `covariance` [L, H*G, D, D] over all queries of contexts [1, S] but the first `sinks`."""
    statistics = QueryMoments(sinks)
    sums: list[Tensor] = []  # number of queries, their sum, the sum of their outer products
    for context in contexts:
        cache = prefill(model, context.to(model.device), window=0, policies=[Policy(ExpectedAttention(sinks=sinks))])
        moments = [statistics.moments(layer.observation()) for layer in cache.compressed_layers()]
        mean, covariance = (torch.cat(parts).double() for parts in zip(*moments, strict=True))
        queries = max(context.shape[1] - sinks, 0)
        new = [torch.tensor(queries), queries * mean, queries * (covariance + mean.unsqueeze(-1) * mean.unsqueeze(-2))]
        sums = [total + part for total, part in zip(sums, new, strict=True)] if sums else new
    mean = sums[1] / sums[0]
    return {"mean": mean, "covariance": sums[2] / sums[0] - mean.unsqueeze(-1) * mean.unsqueeze(-2)}
