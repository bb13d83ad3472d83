"""How long a value is after the output projection."""

import torch
from torch import Tensor


def output_norms(values: Tensor, weight: Tensor, order: int) -> Tensor:
    """Norm of what each entry's value adds to the layer's output through each query head, [B, H, G, S] float32.

    One query head is projected at a time: at once it would be G*E/D times the size of the values.

    Args:
        values: [B, H, S, D].
        weight: [E, H*G*D] of the output projection; query heads h*G .. h*G+G-1 read kv head h.
        order: 1 or 2, which norm over the hidden size.
    """
    heads, dim = values.shape[1], values.shape[3]
    through = weight.float().unflatten(1, (heads, -1, dim))  # [E, H, G, D]
    projected = [
        torch.stack([(values[:, h].float() @ through[:, h, g].T).norm(order, -1) for g in range(through.shape[2])], 1)
        for h in range(heads)
    ]
    return torch.stack(projected, 1)
