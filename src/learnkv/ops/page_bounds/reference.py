"""Page bounds by scattered minima and maxima."""

import torch
from torch import Tensor


def page_bounds(
    keys: Tensor,
    start: Tensor,
    length: Tensor,
    longest: int,
    first: Tensor,
    bounds: Tensor,
    page_size: int,
    slots: Tensor | None,
) -> None:
    rows, _, pages, dim = bounds.shape
    entry = torch.arange(longest, device=keys.device)
    place = start.unsqueeze(-1) + (entry if slots is None else slots[:, :longest])
    there = entry < length.unsqueeze(-1)
    found = keys.index_select(0, place.clamp(0, max(keys.shape[0] - 1, 0)).flatten()).view(rows, longest, dim)
    # An entry that is not there goes to a page of its own, which is thrown away.
    page = torch.where(there, (first.unsqueeze(-1) + entry) // page_size, pages)
    index = page.unsqueeze(-1).expand_as(found)
    for at, how in enumerate(("amin", "amax")):
        padded = torch.cat([bounds[:, at], bounds.new_zeros(rows, 1, dim)], 1)
        bounds[:, at] = padded.scatter_reduce(1, index, found, how)[:, :pages]


def page_scores(query: Tensor, bounds: Tensor, pages: Tensor, group_reduce: str) -> Tensor:
    rows, _, count, dim = bounds.shape
    exact = torch.promote_types(query.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by
    grouped = query.to(exact).reshape(rows, -1, dim)
    low, high = (bounds[:, at].to(exact).transpose(1, 2) for at in (0, 1))
    scores = grouped.clamp(min=0) @ high + grouped.clamp(max=0) @ low  # [R, G, P]
    scores = scores.masked_fill(
        (torch.arange(count, device=query.device) >= pages.unsqueeze(-1)).unsqueeze(1), -torch.inf
    )
    if group_reduce == "none":
        return scores.reshape(-1, count)
    if group_reduce == "max":
        return scores.amax(1)
    return scores.mean(1) if group_reduce == "mean" else scores.sum(1)
