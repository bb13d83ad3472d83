"""Probability of drawing entries one after the other, without replacement."""

import torch
from torch import Tensor


def log_probability(scores: Tensor, order: Tensor, first: Tensor, count: Tensor) -> Tensor:
    """Logarithm of the probability of a part of an order, sum_r [s_r - logsumexp(s_r, s_r+1, …)], [...] float32.

    Entries are drawn with odds exp(s) among those that are left, which is what Gumbel noise on s does (Kool et al.,
    arXiv 1903.06059).

    Args:
        scores: [..., S]; -inf is no entry.
        order: [..., S] slots in the order in which they were drawn, all of them; those that are no entry at the end.
        first: [...] places of the order that are not counted, such as those of entries that are always kept.
        count: [...] draws that are counted after these.
    """
    drawn = scores.gather(-1, order)
    place = torch.arange(scores.shape[-1], device=scores.device)
    begin, end = first.unsqueeze(-1), (first + count).unsqueeze(-1)
    counted = (place >= begin) & (place < end)
    among = drawn.masked_fill((place < begin) | drawn.isinf(), torch.finfo(drawn.dtype).min)
    left = among.flip(-1).logcumsumexp(-1).flip(-1)
    return torch.where(counted, among - left, 0.0).sum(-1)
