"""Gated attention in plain, differentiable operations; softmax in float32."""

import torch
from torch import Tensor

from learnkv.ops.decode_attention.reference import causal_tail
from learnkv.ops.mask_gradient import OVERFLOW_CLIP


def gated_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    tail_keys: Tensor,
    tail_values: Tensor,
    tail_mask: Tensor | None,
    scaling: float,
) -> Tensor:
    rows, query_heads, new, dim = query.shape
    batch, heads, slots, _ = keys.shape
    copies, group, tail = rows // batch, query_heads // heads, tail_keys.shape[2]
    exact = torch.promote_types(query.dtype, torch.float32)  # float64 inputs give the truth that kernels are judged by

    # The continuations of one prompt are queries of one attention: the prompt's keys are never repeated.
    packed = query.reshape(batch, copies, heads, group * new, dim).transpose(1, 2)
    past = torch.einsum("bhcqd,bhsd->bhcqs", packed, keys).to(exact) * scaling
    tail_shape = (batch, copies, heads, tail, dim)
    recent_keys = tail_keys.reshape(tail_shape).transpose(1, 2)
    recent_values = tail_values.reshape(tail_shape).transpose(1, 2)
    recent = (packed @ recent_keys.transpose(-1, -2)).to(exact) * scaling
    seen = tail_mask if tail_mask is not None else causal_tail(new, tail, query.device).expand(rows, 1, new, tail)
    seen = seen.view(batch, 1, copies, 1, new, tail).expand(-1, -1, -1, group, -1, -1)
    recent = recent.masked_fill(~seen.reshape(batch, 1, copies, group * new, tail), float("-inf"))

    gate = gates.to(exact).view(batch, heads, 1, 1, slots)
    biased = past + gate.detach().log()
    top = torch.maximum(biased.detach().amax(-1, keepdim=True), recent.detach().amax(-1, keepdim=True))
    top = top.masked_fill(top == float("-inf"), 0)
    # The second term is zero and has the gate's gradient, which a gate of 0 needs a bound for.
    past_weight = (biased - top).exp() + (gate - gate.detach()) * (past.detach() - top).clamp_max(OVERFLOW_CLIP).exp()
    recent_weight = (recent - top).exp()
    mass = past_weight.sum(-1, keepdim=True) + recent_weight.sum(-1, keepdim=True)
    mass = mass.masked_fill(mass == 0, 1)  # a query that sees nothing gets zero
    output = torch.einsum("bhcqs,bhsd->bhcqd", (past_weight / mass).to(values.dtype), values)
    output = output + (recent_weight / mass).to(values.dtype) @ recent_values
    return output.transpose(1, 2).reshape(rows, query_heads, new, dim)
