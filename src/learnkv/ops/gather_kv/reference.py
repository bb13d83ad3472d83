"""Compaction by one indexed copy."""

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
) -> None:
    rows, slots, dim = keys.shape
    begin, end = int(start[0]), int(start[-1] + length[-1])
    local = index[begin:end] - first_row * slots
    torch.index_select(keys.reshape(rows * slots, dim), 0, local, out=out_keys[begin:end])
    torch.index_select(values.reshape(rows * slots, dim), 0, local, out=out_values[begin:end])
