"""Compaction by one indexed copy."""

from collections.abc import Sequence

import torch
from torch import Tensor


def gather_kv(
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    first_row: int,
    start: Tensor,
    length: Tensor,
    out_keys: Tensor,
    out_values: Tensor,
    rerotation: tuple[Tensor, Tensor, Tensor] | None,
    spans: Sequence[tuple[int, int]] | None,
) -> None:
    rows, slots, dim = keys.shape
    begin, end = (spans[0][0], sum(spans[-1])) if spans is not None else (int(start[0]), int(start[-1] + length[-1]))
    local = index[begin:end] - first_row * slots
    torch.index_select(keys.reshape(rows * slots, dim), 0, local, out=out_keys[begin:end])
    torch.index_select(values.reshape(rows * slots, dim), 0, local, out=out_values[begin:end])
    if rerotation is None:
        return
    positions, first, frequencies = rerotation
    row = local // slots
    rank = torch.arange(begin, end, device=keys.device) - start[row]
    exact = torch.promote_types(keys.dtype, torch.float32)
    angle = (first[row] + rank - positions[begin:end]).unsqueeze(-1) * frequencies.to(exact)
    held, half = out_keys[begin:end], len(frequencies)
    one, other = held[:, :half].to(exact), held[:, half : 2 * half].to(exact)
    cos, sin = angle.cos(), angle.sin()
    held[:, : 2 * half] = torch.cat([one * cos - other * sin, other * cos + one * sin], 1)
