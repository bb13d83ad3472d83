"""Rotations to the axes of a covariance, whose variances are then spread over the channels."""

from typing import Literal

import torch
from torch import Tensor

from learnkv.ops.hadamard import hadamard

Order = Literal["r_h_pbr", "r_pbr", "r_h", "h_r_pbr"]


def query_covariance(queries: Tensor) -> Tensor:
    """Second moments [H, D, D] of queries [N, H, G, D], mean over tokens and over the query heads of a kv head."""
    exact = queries.to(torch.promote_types(queries.dtype, torch.float32))
    return torch.einsum("nhgd,nhge->hde", exact, exact) / (exact.shape[0] * exact.shape[2])


def value_covariance(values: Tensor, keys: Tensor, of_queries: Tensor) -> Tensor:
    """Second moments [H, D, D] of values [N, H, D], weighted by how much queries see of their keys [N, H, D].

    Weights are k C k^T with the queries' moments C [H, D, D], and have the mean 1 in every head.
    """
    values = values.to(of_queries.dtype)
    weights = key_weights(keys.to(of_queries.dtype).transpose(0, 1), of_queries).T
    return torch.einsum("nh,nhd,nhe->hde", weights / weights.mean(0), values, values) / len(values)


def key_weights(keys: Tensor, of_queries: Tensor) -> Tensor:
    """How much queries with second moments C [..., D, D] see of keys k [..., N, D]: k C k^T [..., N]."""
    return ((keys @ of_queries) * keys).sum(-1)


def bit_reversal(dim: int) -> Tensor:
    """[dim] int64: every index, a power of two of them, with its bits in the reverse order."""
    width, index = dim.bit_length() - 1, torch.arange(dim)
    return sum(((index >> bit & 1) << (width - 1 - bit) for bit in range(width)), torch.zeros_like(index))


def compose(eigenvectors: Tensor, eigenvalues: Tensor, order: Order = "r_h_pbr") -> Tensor:
    """The rotation R [..., D, D], stored = vector @ R, of eigenvectors U in columns and their eigenvalues [..., D].

    R = U H P: H a Hadamard matrix; P puts the channel of the i-th largest eigenvalue at the place whose bits are those
    of i in reverse, so that neighbouring groups of channels hold large and small ones alike. Others leave out H or P,
    or turn them round.
    """
    dim = eigenvectors.shape[-1]
    spread = hadamard(dim, eigenvectors.device).to(eigenvectors.dtype)
    if order == "r_h":
        return eigenvectors @ spread
    ranked = eigenvalues.argsort(descending=True, dim=-1)
    places = torch.empty_like(ranked)
    places[..., bit_reversal(dim).to(ranked.device)] = ranked
    rotated = {"r_h_pbr": eigenvectors @ spread, "r_pbr": eigenvectors, "h_r_pbr": spread @ eigenvectors}[order]
    return rotated.gather(-1, places.unsqueeze(-2).expand_as(rotated))


def covariance_rotation(covariance: Tensor, order: Order = "r_h_pbr") -> Tensor:
    """Rotation [..., D, D] in float32 of second moments [..., D, D], computed in float64."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance.double())
    return compose(eigenvectors, eigenvalues, order).float()
