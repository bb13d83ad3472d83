"""TurboQuant: directions in codes of the best scalar quantiser after a random rotation, norms beside them."""

import functools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from learnkv.core.codec import Codec, Encoded, ScaleDtype, Source, check_choice, torch_dtype
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.ops.hadamard import check_hadamard, hadamard
from learnkv.ops.quantize import pack, packed_bytes, unpack

RandomRotation = Literal["qr", "hadamard"]
LEVELS = {
    1: (0.797885,),
    2: (0.452781, 1.510469),
    3: (0.245104, 0.756031, 1.344134, 2.15209),
    4: (0.12835, 0.388089, 0.656804, 0.942391, 1.256233, 1.618002, 2.069016, 2.733266),
}
"""Positive levels of the Lloyd-Max quantiser of a normal variable as they are in use; each is the mean of the numbers
that it stands for to within 0.04 %."""


class TurboQuant(Codec):
    """Rotated directions in Lloyd-Max codes, and the norm of every entry (TurboQuant, arXiv 2504.19874).

    After a random rotation the channels of a direction are almost independent and normal with variance 1 / D; every
    one is coded by the scalar quantiser with the smallest mean squared error for that. The norm of what is decoded is
    not restored. This is the variant for squared errors; the one for inner products is not here.

    Args:
        bits: of a code, 1 to 4.
        rotation: qr: of a normal matrix; hadamard: three Hadamard matrices with random signs, D a power of two.
        seed: of the rotation.
        table: safetensors file with a `rotation` [D, D] to use instead; stored = vector @ rotation^T.
        scale_dtype: of the norms.
    """

    status = "port"
    table_argument = "table"
    independent = True

    def __init__(
        self,
        bits: int = 4,
        rotation: RandomRotation = "qr",
        seed: int = 42,
        table: str | None = None,
        scale_dtype: ScaleDtype = "float32",
    ) -> None:
        super().__init__()
        if bits not in LEVELS:
            raise UserError(f"bits={bits}: expected 1, 2, 3 or 4")
        check_choice("rotation", rotation, RandomRotation)
        check_choice("scale_dtype", scale_dtype, ScaleDtype)
        self.bits, self.rotation, self.seed, self.scale_dtype = bits, rotation, seed, scale_dtype
        self._table = None if table is None else _orthogonal(table)

    def basis(self, layer_idx: int, head_dim: int, device: torch.device | None = None) -> Tensor | None:
        if self._table is None:
            return random_rotation(head_dim, self.rotation, self.seed).T.unsqueeze(0).to(device)
        if len(self._table) != head_dim:
            raise UserError(f"table=: rotates {len(self._table)} channels, heads have {head_dim}")
        return self._table.T.unsqueeze(0).to(device)

    def nbytes(self, entries: Sequence[int], head_dim: int, itemsize: int = 2) -> int:
        if self._table is None and self.rotation == "hadamard":
            check_hadamard(head_dim)
        return sum(entries) * (packed_bytes(head_dim, self.bits) + torch_dtype(self.scale_dtype).itemsize)

    def _encode(self, source: Source) -> dict[str, Tensor]:
        entries = source.entries.float()
        norm = torch.linalg.vector_norm(entries, dim=-1)
        direction = entries / norm.clamp(min=torch.finfo(norm.dtype).tiny).unsqueeze(-1)
        # Ties at a border go to the lower level, as in `bucketize`.
        levels = self._levels(entries)
        codes = torch.bucketize(direction, (levels[1:] + levels[:-1]) / 2)
        return {"codes": pack(codes, self.bits), "norm": norm.to(torch_dtype(self.scale_dtype))}

    def _decode(self, encoded: Encoded) -> Tensor:
        codes, norm = encoded.tensors["codes"], encoded.tensors["norm"]
        entries = norm.new_empty(0, encoded.head_dim)
        direction = self._levels(entries)[unpack(codes, self.bits, encoded.head_dim).long()]
        return norm.float().unsqueeze(-1) * direction

    def _levels(self, like: Tensor) -> Tensor:
        return lloyd_max(self.bits).to(like.device) / math.sqrt(like.shape[-1])


def lloyd_max(bits: int) -> Tensor:
    """Ascending levels [2^bits], float32, for variance 1."""
    positive = torch.tensor(LEVELS[bits], dtype=torch.float32)
    return torch.cat([-positive.flip(0), positive])


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept, and used where gradients are computed
@functools.cache
def random_rotation(dim: int, kind: RandomRotation, seed: int) -> Tensor:
    """An orthogonal matrix [dim, dim], float32 on the CPU, that is a function of the seed; not to be written into."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "qr":
        normal = torch.randn(dim, dim, generator=generator, dtype=torch.float32, device="cpu")
        orthogonal, upper = torch.linalg.qr(normal)
        rotation: Tensor = orthogonal * upper.diagonal().sign()
        return rotation
    matrix = torch.eye(dim, dtype=torch.float32, device="cpu")
    for _ in range(3):
        signs = torch.randint(0, 2, (dim,), generator=generator, device="cpu") * 2 - 1
        matrix = hadamard(dim) @ (signs.unsqueeze(-1) * matrix)
    return matrix


def _orthogonal(table: str) -> Tensor:
    matrix = tensors.read(table, {"rotation": "DD"})["rotation"]
    check_orthogonal(matrix, table)
    return matrix


def check_orthogonal(matrices: Tensor, name: str) -> None:
    """Raise UserError for matrices [..., D, D] that do not keep products of vectors as they are."""
    error = float((matrices @ matrices.mT - torch.eye(matrices.shape[-1], dtype=matrices.dtype)).abs().max())
    if not error < 1e-3:
        raise UserError(f"{name}: expected orthogonal rotations, R R^T differs from the identity by {error:.3g}")
