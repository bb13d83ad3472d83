"""A checksum of tensors' contents."""

from collections.abc import Iterable

import torch
from torch import Tensor

_PIECE = 2**20
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, as int64: multiplying by it modulo 2^64 loses nothing


def checksum(tensors: Iterable[Tensor]) -> int:
    """A 64-bit integer that depends on every bit and its place: sum_i bits_i * (2i + 1) * factor modulo 2^64.

    Values count as float32. Equal on all devices; tensors of the meta device do not count. One host-device
    synchronisation.
    """
    total: Tensor | None = None
    begin = 0
    for tensor in tensors:
        if tensor.is_meta:
            continue
        for piece in tensor.detach().reshape(-1).split(_PIECE):
            bits = piece.float().contiguous().view(torch.int32).long()
            place = torch.arange(begin, begin + len(bits), device=bits.device)
            part = (bits * (2 * place + 1) * _FACTOR).sum()
            total = part if total is None else total.to(part.device) * 31 + part
            begin += len(bits)
    return 0 if total is None else int(total)
