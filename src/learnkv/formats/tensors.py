"""Tensors by name in a safetensors file, all stacked over the layers of a model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learnkv.errors import UserError

MOMENTS = {"mean": "LND", "covariance": "LNDD"}
"""Mean and covariance of the queries of N query heads before rotation."""
KVZIP_GATE = {
    "q_proj.weight": "LQE",
    "q_proj.bias": "LQ",
    "k_proj.weight": "LKE",
    "q_norm.weight": "LF",
    "k_norm.weight": "LF",
    "k_base": "LH1SF",
    "b": "LH1G",
}
"""Fast KVzip's gate for H kv heads of G query heads: F features, S base keys, Q = H*G*F, K = H*F."""


def read(path: str | Path, shapes: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors in float32, whose dimensions are named by the letters of `shapes` (1: one).

    Raises:
        UserError: no such file, another format, a tensor that is missing, sizes that contradict each other.
    """
    try:
        held = load_file(Path(path).expanduser())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    sizes: dict[str, int] = {"1": 1}
    for name, letters in shapes.items():
        have = tuple(held[name].shape) if name in held else ()
        if len(have) != len(letters) or any(
            sizes.setdefault(*one) != one[1] for one in zip(letters, have, strict=True)
        ):
            raise UserError(f"{path}: expected {name} of shape [{', '.join(letters)}], got {list(have)}")
    return {name: held[name].float() for name in shapes}


def write(path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Write tensors in one type."""
    where = Path(path).expanduser()
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: one.detach().cpu().to(dtype).contiguous() for name, one in tensors.items()}, where)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from None
    return where


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Hexadecimal digits that differ where names or values do."""
    found = hashlib.sha256()
    for name, one in sorted(tensors.items()):
        found.update(f"{name} {tuple(one.shape)} {one.dtype}".encode())
        found.update(one.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def stack(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of every layer, stacked."""
    return {name: torch.stack([one[name] for one in layers]) for name in layers[0]}
