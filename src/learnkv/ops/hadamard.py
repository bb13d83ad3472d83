"""Hadamard matrices: rotations that spread an outlier over all channels."""

import functools
import math

import torch
from torch import Tensor

from learnkv.errors import UserError


def check_hadamard(dim: int) -> None:
    """Raise UserError for sizes without a matrix of Sylvester's construction."""
    if dim < 1 or dim & (dim - 1):
        raise UserError(f"rotation=hadamard: {dim} channels have no Hadamard matrix here, expected a power of two")


def hadamard(dim: int, device: torch.device | None = None) -> Tensor:
    """[dim, dim] float32: Sylvester's matrix of +-1, divided by sqrt(dim); symmetric and its own inverse.

    The same tensor at every call for a device, which is not to be written into: attention to tiers compares bases.

    Raises:
        UserError: for sizes that are no power of two.
    """
    check_hadamard(dim)
    return _matrix(dim, torch.device("cpu") if device is None else device)


@functools.cache
def _matrix(dim: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float32, device=device)
        while len(matrix) < dim:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix / math.sqrt(dim)
