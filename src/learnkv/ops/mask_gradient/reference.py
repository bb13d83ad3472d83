"""The gradients of ragged attention written out; rows of the pool are read in place."""

import torch
from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.mask_gradient import OVERFLOW_CLIP
from learnkv.ops.softmax_terms import SoftmaxTerms, at_least, times
from learnkv.ops.tail_slots import causal_tail


def mask_gradient(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    kept_gates: Tensor | None,
    terms: SoftmaxTerms,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`mask_gradient` in PyTorch."""
    rows, query_heads, new, dim = query.shape
    batch, heads = keys.shape[:2]
    slots, packed = tail.keys.shape[2], query_heads // heads * new
    exact = torch.promote_types(query.dtype, torch.float32)

    def by_row(tensor: Tensor) -> Tensor:
        return tensor.to(exact).reshape(rows * heads, packed, -1)

    scaled_query, pull, log_mass = by_row(query) * scaling, by_row(grad), by_row(lse)
    delta = (pull * by_row(output)).sum(-1, keepdim=True)
    log_mass = log_mass.masked_fill(log_mass == -torch.inf, torch.inf)  # a query that attends to nothing has no weights

    tail_keys, tail_values = (part.to(exact).reshape(-1, slots, dim) for part in (tail.keys, tail.values))
    mask = tail.mask if tail.mask is not None else causal_tail(new, slots, query.device)
    mask = mask.expand(rows, 1, new, slots).unsqueeze(2).expand(rows, heads, packed // new, new, slots)
    scores = terms.capped(scaled_query @ tail_keys.mT)
    capped_slope = terms.slope(scores)
    scores = scores.masked_fill(~mask.reshape(-1, packed, slots), -torch.inf)
    top = at_least(scores.amax(-1, keepdim=True), terms.of_rows(rows, heads, new))
    weight = (scores - log_mass).exp()
    slope = times(weight * (pull @ tail_values.mT - delta), capped_slope)
    query_gradient = slope @ tail_keys
    tail_gradients = [(slope.mT @ scaled_query).view(tail.keys.shape), (weight.mT @ pull).view(tail.values.shape)]

    for view in kept.host_spans().views:
        if view.length == 0:  # rows without entries
            continue
        own = slice(view.first, view.first + view.rows)
        kept_keys, kept_values = (view.of(pool).to(exact) for pool in (kept.keys, kept.values))
        scores = terms.capped(scaled_query[own] @ kept_keys.mT)
        capped_slope = terms.slope(scores)
        if kept_gates is not None:
            scores += view.of(kept_gates.unsqueeze(-1)).to(exact).log().mT
        top[own] = torch.maximum(top[own], scores.amax(-1, keepdim=True))
        weight = scores.sub_(log_mass[own]).exp_()
        slope = times(weight * (pull[own] @ kept_values.mT - delta[own]), capped_slope)
        query_gradient[own] += slope @ kept_keys

    def by_prompt(tensor: Tensor) -> Tensor:
        return tensor.view(batch, -1, heads, packed, tensor.shape[-1]).transpose(1, 2).flatten(2, 3)

    scores = terms.capped(by_prompt(scaled_query) @ keys.to(exact).mT)
    weight = torch.minimum(scores, by_prompt(top + OVERFLOW_CLIP), out=scores).sub_(by_prompt(log_mass)).exp_()
    gradient = ((weight.mT @ by_prompt(pull)) * values).sum(-1) - (weight.mT @ by_prompt(delta)).squeeze(-1)
    query_gradient = query_gradient.mul_(scaling).to(query.dtype).view(query.shape)
    return gradient, query_gradient, tail_gradients[0].to(tail.keys.dtype), tail_gradients[1].to(tail.values.dtype)
