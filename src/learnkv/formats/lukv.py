"""LU-KV's budget curve: `.npy` [99, L, H], the fraction to evict in each kv head for a global target of 1, …, 99 %."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learnkv.errors import UserError

TARGETS = 99


def read(path: str | Path) -> Tensor:
    """The curve [99, L, H] in its own float type, as stored; never a pickle.

    Raises:
        UserError: no such file, another format, another shape.
    """
    where = Path(path).expanduser()
    try:
        held = np.load(where, allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: expected numbers in .npy format: {str(error).splitlines()[0]}") from None
    if not isinstance(held, np.ndarray) or held.dtype.kind != "f" or held.dtype.itemsize > 8:
        raise UserError(f"{path}: expected one array of floating point numbers")
    if held.ndim != 3 or held.shape[0] != TARGETS or held.size == 0:
        raise UserError(f"{path}: expected a curve [{TARGETS}, layers, kv heads], got {list(held.shape)}")
    if not np.isfinite(held).all():
        raise UserError(f"{path}: expected finite numbers")
    return torch.from_numpy(held.astype(held.dtype.newbyteorder("=")))


def write(path: str | Path, curve: Tensor) -> Path:
    """Write a curve [99, L, H]; what it holds is not checked."""
    assert curve.ndim == 3, curve.shape
    assert curve.shape[0] == TARGETS, curve.shape
    where = Path(path).expanduser()
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        with where.open("wb") as file:
            np.save(file, curve.detach().cpu().numpy(), allow_pickle=False)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return where
