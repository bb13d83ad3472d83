"""Tensors by name in a safetensors file, all stacked over the layers of a model."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import output_file, read_tensors

MOMENTS = {"mean": "LND", "covariance": "LNDD"}
"""Mean and covariance of the queries of N query heads before rotation."""
FREQUENCIES = {"mean": "LND", "magnitude": "LNF", "frequency": "LF", "scale": "LF", "layout": "L4"}
"""Mean query of N query heads before rotation, mean magnitudes of its F rotated pairs of channels, the pairs' radians
per position, the factor that RoPE scales them by, and the numbers of `ops.rotary.Layout`."""
COVARIANCE_ROTATION = {"keys": "LHDD", "values": "LHDD"}
"""OSCAR's rotations of H kv heads, or of all alike with H = 1: stored = vector @ rotation."""
RETENTION = {"in.weight": "LWE", "in.bias": "LW", "out.weight": "LHW", "out.bias": "LH"}
"""TrimKV's gates for H kv heads: W hidden units, E inputs."""
INDEXER = {
    "query.weight": "LRQ",
    "q_norm.weight": "LF",
    "key.weight": "LFE",
    "k_norm.weight": "LF",
    "gate.weight": "LIE",
}
"""IndexMem's indexers: Q numbers of all queries of a token, hidden size E, I index heads of F channels, R = I*F."""
LAYER_ROUTER = {
    "f.0.weight": "LPD",
    "f.0.bias": "LP",
    "f.2.weight": "LQP",
    "f.2.bias": "LQ",
    "r.0.weight": "LRQ",
    "r.0.bias": "LR",
    "r.2.weight": "LDR",
    "r.2.bias": "LD",
    "r.4.weight": "LCD",
    "r.4.bias": "LC",
}
"""Flux Attention's routers for head size D: features of P and Q numbers, then R and D, and C = 1 or 2 logits."""
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
    """Tensors in float32; the letters of `shapes` name their dimensions, equal letters equal sizes (1, 4: that size).

    Raises:
        UserError: no such file, another format, a tensor that is missing, sizes that contradict each other.
    """
    tensors = read_tensors(path)
    sizes: dict[str, int] = {"1": 1, "4": 4}
    for name, letters in shapes.items():
        shape = tuple(tensors[name].shape) if name in tensors else ()
        if len(shape) != len(letters) or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)
        ):
            raise UserError(f"{path}: expected {name} of shape [{', '.join(letters)}], got {list(shape)}")
    return {name: tensors[name].float() for name in shapes}


def write(path: str | Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    """Write tensors in one type."""
    with output_file(path) as part:
        save_file({name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in tensors.items()}, part)
    return Path(path).expanduser()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and values, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def stack(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of every layer, stacked."""
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
