"""Normal quantiles of ranks: scores of unit scale that keep every order."""

import torch
from torch import Tensor


def normal_scores(scores: Tensor, valid: Tensor) -> Tensor:
    """Normal quantiles of the ranks that the valid entries have among all of their row, [B, H, S] float32.

    Ranks are taken over all heads of a row together, so that heads stay comparable; equal scores share their mean rank.
    What is returned for entries that are not valid means nothing.

    Args:
        scores: [B, H, S].
        valid: [B, H, S] bool.
    """
    flat = scores.float().masked_fill(~valid, torch.inf).flatten(1)
    ordered = flat.sort(dim=-1).values
    count = valid.flatten(1).sum(-1, keepdim=True)
    below = torch.searchsorted(ordered, flat)
    not_above = torch.searchsorted(ordered, flat, right=True).minimum(count)
    share = ((below + not_above).double() / 2 / count.clamp_min(1)).clamp(1e-9, 1 - 1e-9)
    quantiles: Tensor = torch.special.ndtri(share)
    return quantiles.float().view_as(scores)


def unit_scale(scores: Tensor) -> Tensor:
    """Scores [L, B, H, S] whose size means the same in every head.

    Learned ones (that have a gradient) as they are; a heuristic's as normal scores of their ranks within each head,
    infinite ones unchanged.
    """
    if scores.requires_grad:
        return scores
    free = scores.isfinite()
    normal = normal_scores(scores.flatten(0, 2).unsqueeze(1), free.flatten(0, 2).unsqueeze(1))
    return torch.where(free, normal.view_as(scores), scores)
