"""Means over neighbours whose number and offset differ from row to row."""

import torch
from torch import Tensor


def shifted_mean(values: Tensor, among: Tensor, width: Tensor, shift: Tensor) -> Tensor:
    """Mean of `width` neighbours around the slot `shift` further on, [..., S] float32.

    Beyond the first and the last entry `among` the row, these two are repeated; other slots count as zeros.

    Args:
        values: [..., S].
        among: [..., S] bool, broadcast.
        width: [...] odd number of neighbours.
        shift: [...] whole number.
    """
    slots = torch.arange(values.shape[-1], device=values.device)
    among = among.expand_as(values)
    row = values.masked_fill(~among, 0.0).double()
    first = among.int().argmax(-1, keepdim=True)
    last = (slots * among).amax(-1, keepdim=True)
    width, shift = width.long().unsqueeze(-1), shift.long().unsqueeze(-1)
    begin = slots - width // 2 + shift  # [..., S], and the slot after the last neighbour
    end = begin + width
    sums = torch.cat([torch.zeros_like(row[..., :1]), row.cumsum(-1)], -1)
    inner_begin = begin.clamp(min=first).clamp(max=last + 1)
    inner_end = end.clamp(max=last + 1).maximum(inner_begin)
    inner = sums.gather(-1, inner_end) - sums.gather(-1, inner_begin)
    before = (first.minimum(end) - begin).clamp(min=0) * row.gather(-1, first)
    after = (end - 1 - last.maximum(begin - 1)).clamp(min=0) * row.gather(-1, last)
    return ((inner + before + after) / width).float()
