"""The gradients of ragged attention written out; rows of the pool are read where they lie."""

import torch
from torch import Tensor

from learnkv.ops.decode_attention.reference import causal_tail, row_views, strided
from learnkv.ops.mask_gradient import OVERFLOW_CLIP


def mask_gradient(
    grad: Tensor,
    query: Tensor,
    output: Tensor,
    lse: Tensor,
    keys: Tensor,
    values: Tensor,
    kept_keys: Tensor,
    kept_values: Tensor,
    start: Tensor,
    length: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
    kept_gates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, query_heads, new, dim = query.shape
    batch, heads = keys.shape[:2]
    tail, packed = tail_keys.shape[2], query_heads // heads * new
    exact = torch.promote_types(query.dtype, torch.float32)

    def by_row(tensor: Tensor) -> Tensor:
        return tensor.to(exact).reshape(rows * heads, packed, -1)

    asked, pull, log_mass = by_row(query) * scaling, by_row(grad), by_row(lse)
    delta = (pull * by_row(output)).sum(-1, keepdim=True)
    log_mass = log_mass.masked_fill(log_mass == -torch.inf, torch.inf)  # a query that sees nothing has no weights

    recent_keys, recent_values = (held.to(exact).reshape(-1, tail, dim) for held in (tail_keys, tail_values))
    seen = tail_mask if tail_mask is not None else causal_tail(new, tail, query.device)
    seen = seen.expand(rows, 1, new, tail).unsqueeze(2).expand(rows, heads, packed // new, new, tail)
    scores = (asked @ recent_keys.mT).masked_fill(~seen.reshape(-1, packed, tail), -torch.inf)
    top = scores.amax(-1, keepdim=True)
    weight = (scores - log_mass).exp()
    slope = weight * (pull @ recent_values.mT - delta)
    query_gradient = slope @ recent_keys
    tail_gradients = [(slope.mT @ asked).view(tail_keys.shape), (weight.mT @ pull).view(tail_values.shape)]

    for first, count, at, apart, kept in row_views(list(zip(start.tolist(), length.tolist(), strict=True))):
        if kept == 0:
            continue
        own = slice(first, first + count)
        held_keys, held_values = (strided(pool, count, at, apart, kept).to(exact) for pool in (kept_keys, kept_values))
        scores = asked[own] @ held_keys.mT
        if kept_gates is not None:
            scores += strided(kept_gates.unsqueeze(-1), count, at, apart, kept).to(exact).log().mT
        top[own] = torch.maximum(top[own], scores.amax(-1, keepdim=True))
        weight = scores.sub_(log_mass[own]).exp_()
        query_gradient[own] += (weight * (pull[own] @ held_values.mT - delta[own])) @ held_keys

    def by_prompt(tensor: Tensor) -> Tensor:
        return tensor.view(batch, -1, heads, packed, tensor.shape[-1]).transpose(1, 2).flatten(2, 3)

    scores = by_prompt(asked) @ keys.to(exact).mT
    weight = torch.minimum(scores, by_prompt(top + OVERFLOW_CLIP), out=scores).sub_(by_prompt(log_mass)).exp_()
    mask = ((weight.mT @ by_prompt(pull)) * values).sum(-1) - (weight.mT @ by_prompt(delta)).squeeze(-1)
    query_gradient = query_gradient.mul_(scaling).to(query.dtype).view(query.shape)
    return mask, query_gradient, tail_gradients[0].to(tail_keys.dtype), tail_gradients[1].to(tail_values.dtype)
