"""Vectors in the basis in which entries of fewer bits are stored."""

from torch import Tensor


def rotated(vectors: Tensor, basis: Tensor | None) -> Tensor:
    """Vectors [R, T, D] times a basis [R or 1, D, D], rounded once; None: the identity."""
    return vectors if basis is None else (vectors.to(basis.dtype) @ basis).to(vectors.dtype)
