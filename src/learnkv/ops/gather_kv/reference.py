"""Copies kept entries by one indexed copy."""

import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged
from learnkv.ops.rotary import Layout


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    out: Ragged,
    rerotation: tuple[Tensor, Tensor, Tensor, Layout] | None,
) -> None:
    """`gather_kv` in PyTorch."""
    rows, slots, dim = keys.shape
    offset, length = out.offset, out.length
    if out.spans is not None:
        begin, end = out.spans[0][0], sum(out.spans[-1])
    else:
        begin, end = int(offset[0]), int(offset[-1] + length[-1])
    local = index[begin:end] - first_row * slots
    torch.index_select(keys.reshape(rows * slots, dim), 0, local, out=out.keys[begin:end])
    torch.index_select(values.reshape(rows * slots, dim), 0, local, out=out.values[begin:end])
    if rerotation is None:
        return
    positions, first, frequencies, layout = rerotation
    row = local // slots
    rank = torch.arange(begin, end, device=keys.device) - offset[row]
    exact = torch.promote_types(keys.dtype, torch.float32)
    angle = (first[row] + rank - positions[begin:end]).unsqueeze(-1) * frequencies.to(exact)
    written = out.keys[begin:end]
    written[:] = layout.rotate(written.to(exact), angle.cos(), angle.sin())
