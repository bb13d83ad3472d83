"""Page bounds by scattered minima and maxima."""

import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged


def page_bounds(entries: Ragged, first: Tensor, bounds: Tensor, page_size: int, slots: Tensor | None) -> None:
    """`page_bounds` in PyTorch."""
    rows, _, pages, dim = bounds.shape
    keys, longest = entries.keys, entries.longest
    entry = torch.arange(longest, device=keys.device)
    source = entries.offset.unsqueeze(-1) + (entry if slots is None else slots[:, :longest])
    valid = entry < entries.length.unsqueeze(-1)
    read = keys.index_select(0, source.clamp(0, max(keys.shape[0] - 1, 0)).flatten()).view(rows, longest, dim)
    # Slots beyond a row's length go to a page of their own, which is thrown away.
    page = torch.where(valid, (first.unsqueeze(-1) + entry) // page_size, pages)
    index = page.unsqueeze(-1).expand_as(read)
    for side, how in enumerate(("amin", "amax")):
        padded = torch.cat([bounds[:, side], bounds.new_zeros(rows, 1, dim)], 1)
        bounds[:, side] = padded.scatter_reduce(1, index, read, how)[:, :pages]


def page_scores(query: Tensor, bounds: Tensor, pages: Tensor, group_reduce: str) -> Tensor:
    """`page_scores` in PyTorch."""
    rows, _, count, dim = bounds.shape
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(exact).reshape(rows, -1, dim)
    low, high = (bounds[:, side].to(exact).transpose(1, 2) for side in (0, 1))
    scores = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low  # [R, G, P]
    scores = scores.masked_fill(
        (torch.arange(count, device=query.device) >= pages.unsqueeze(-1)).unsqueeze(1), -torch.inf
    )
    if group_reduce == "none":
        return scores.reshape(-1, count)
    if group_reduce == "max":
        return scores.amax(1)
    return scores.mean(1) if group_reduce == "mean" else scores.sum(1)
