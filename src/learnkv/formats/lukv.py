"""LU-KV's budget curve: `.npy` [99, L, H], the fraction to evict in each kv head for a global target of 1, …, 99 %."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import output_file

TARGETS = 99


def read(path: str | Path) -> Tensor:
    """The curve [99, L, H] in its own float type, as stored; never a pickle.

    Raises:
        UserError: no such file, another format, another shape.
    """
    try:
        curve = np.load(Path(path).expanduser(), allow_pickle=False)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise UserError(f"{path}: expected numbers in .npy format: {str(error).splitlines()[0]}") from None
    if not isinstance(curve, np.ndarray) or curve.dtype.kind != "f" or curve.dtype.itemsize > 8:
        raise UserError(f"{path}: expected one array of floating point numbers")
    if curve.ndim != 3 or curve.shape[0] != TARGETS or curve.size == 0:
        raise UserError(f"{path}: expected a curve [{TARGETS}, layers, kv heads], got {list(curve.shape)}")
    if not np.isfinite(curve).all():
        raise UserError(f"{path}: expected finite numbers")
    return torch.from_numpy(curve.astype(curve.dtype.newbyteorder("=")))


def write(path: str | Path, curve: Tensor) -> Path:
    """Write a curve [99, L, H]; its values are not checked."""
    assert curve.ndim == 3, curve.shape
    assert curve.shape[0] == TARGETS, curve.shape
    with output_file(path) as part, part.open("wb") as file:
        np.save(file, curve.detach().cpu().numpy(), allow_pickle=False)
    return Path(path).expanduser()
