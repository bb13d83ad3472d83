"""Rotations of keys and values for codes of two bits (OSCAR)."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.inference.prefill import prefill
from learnkv.ops.covariance_rotation import covariance_rotation, key_weights
from learnkv.ops.hadamard import check_hadamard


@torch.no_grad()
def covariance_rotations(model: Any, contexts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Rotations `keys` and `values` [L, H, D, D] of every kv head, of all tokens of contexts [1, S] after RoPE.

    Keys are rotated to the axes of their queries' second moments; values to those of their own, weighted by how much
    the queries see of their keys (OSCAR, arXiv 2605.17757). Contexts are read twice.

    Raises:
        UserError: for a model whose head size has no Hadamard matrix.
    """
    of_queries = _mean_moments(_layers_of_queries(model, contexts))
    of_values = _mean_moments(_layers_of_values(model, contexts, of_queries))
    return {"keys": covariance_rotation(of_queries), "values": covariance_rotation(of_values)}


def _mean_moments(sums: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """[L, H, D, D] of sums over contexts: weighted outer products [L, H, D, D] and weights [L, H]."""
    products, weights = next(sums)
    for more, of_more in sums:
        products, weights = products + more, weights + of_more
    return products / weights[..., None, None]


def _layers_of_queries(model: Any, contexts: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    for observations in _read(model, contexts):
        queries = torch.stack([_by_head(obs) for obs in observations])
        yield queries.mT @ queries, torch.full(queries.shape[:2], queries.shape[2])


def _layers_of_values(model: Any, contexts: Sequence[Tensor], of_queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for observations in _read(model, contexts):
        keys, values = (
            torch.stack([getattr(obs, name)[0].double() for obs in observations]) for name in ("keys", "values")
        )
        weights = key_weights(keys, of_queries)
        yield (values * weights.unsqueeze(-1)).mT @ values, weights.sum(-1)


def _read(model: Any, contexts: Sequence[Tensor]) -> Iterator[list[Observation]]:
    for context in contexts:
        cache = prefill(model, context.to(model.device), window=context.shape[1])
        observations = [layer.observation() for layer in cache.compressed_layers()]
        check_hadamard(observations[0].keys.shape[-1])
        yield observations


def _by_head(obs: Observation) -> Tensor:
    """Queries [H, G * S, D] of all query heads of a kv head, float64."""
    heads = obs.keys.shape[1]
    queries: Tensor = obs.queries[0].double().unflatten(0, (heads, -1)).flatten(1, 2)
    return queries
