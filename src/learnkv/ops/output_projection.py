"""Norms of vectors after the output projection, head by head."""

import torch
from torch import Tensor

_AT_ONCE = 2**24  # numbers of a projected chunk, 64 MiB


def projected_l1(values: Tensor, weight: Tensor) -> Tensor:
    """L1 norms |W_n v|_1 of values for every query head n, [B, H, G, S] float32.

    Args:
        values: [B, H, S, D].
        weight: [E, H*G*D], of which columns n*D .. n*D+D-1 are W_n.
    """
    batch, heads, slots, dim = values.shape
    parts = weight.float().unflatten(1, (heads, -1, dim)).permute(1, 2, 3, 0)  # [H, G, D, E]
    step = max(1, _AT_ONCE // (batch * weight.shape[0]))
    norms = values.new_empty((*values.shape[:2], parts.shape[1], slots), dtype=torch.float32)
    for head in range(heads):
        for member in range(parts.shape[1]):
            for begin in range(0, slots, step):
                chunk = values[:, head, begin : begin + step].float()
                norms[:, head, member, begin : begin + step] = (chunk @ parts[head, member]).abs().sum(-1)
    return norms


def projected_l2(values: Tensor, weight: Tensor) -> Tensor:
    """L2 norms |W_n v|_2 of values, [B, H, G, S] float32; arguments as for `projected_l1`."""
    heads, dim = values.shape[1], values.shape[3]
    members = isometries(weight, weight.shape[1] // dim).unflatten(0, (heads, -1)).unbind(1)  # G of [H, R, D]
    return torch.stack([(values.float() @ part.transpose(1, 2)).norm(dim=-1) for part in members], 2)


def isometries(weight: Tensor, heads: int) -> Tensor:
    """Small matrices R_n [N, min(D, E), D] float32 with |R_n x|_2 = |W_n x|_2 for the `heads` parts of `weight`."""
    parts = weight.float().unflatten(1, (heads, -1)).permute(1, 0, 2)  # [N, E, D]
    triangular: Tensor = torch.linalg.qr(parts, mode="r").R
    return triangular
