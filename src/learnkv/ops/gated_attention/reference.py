"""Gated attention in plain, differentiable operations; softmax in float32."""

import torch
from torch import Tensor

from learnkv.ops.arguments import Tail
from learnkv.ops.mask_gradient import OVERFLOW_CLIP
from learnkv.ops.softmax_terms import SoftmaxTerms, at_least
from learnkv.ops.tail_slots import causal_tail


def gated_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    tail: Tail,
    scaling: float,
    terms: SoftmaxTerms,
) -> Tensor:
    """`gated_attention` in PyTorch."""
    rows, query_heads, new, dim = query.shape
    batch, heads, slots, _ = keys.shape
    copies, group, tail_slots = rows // batch, query_heads // heads, tail.keys.shape[2]
    # In float64, float64 inputs give the truth that kernels are compared with.
    exact = torch.promote_types(query.dtype, torch.float32)

    # The continuations of one prompt are queries of one attention: the prompt's keys are never repeated.
    packed = query.reshape(batch, copies, heads, group * new, dim).transpose(1, 2)
    past = terms.capped(torch.einsum("bhcqd,bhsd->bhcqs", packed, keys).to(exact) * scaling)
    tail_shape = (batch, copies, heads, tail_slots, dim)
    recent_keys = tail.keys.reshape(tail_shape).transpose(1, 2)
    recent_values = tail.values.reshape(tail_shape).transpose(1, 2)
    recent = terms.capped((packed @ recent_keys.transpose(-1, -2)).to(exact) * scaling)
    mask = tail.mask
    if mask is None:
        mask = causal_tail(new, tail_slots, query.device).expand(rows, 1, new, tail_slots)
    mask = mask.view(batch, 1, copies, 1, new, tail_slots).expand(-1, -1, -1, group, -1, -1)
    recent = recent.masked_fill(~mask.reshape(batch, 1, copies, group * new, tail_slots), float("-inf"))

    gate = gates.to(exact).view(batch, heads, 1, 1, slots)
    biased = past + gate.detach().log()
    top = torch.maximum(biased.detach().amax(-1, keepdim=True), recent.detach().amax(-1, keepdim=True))
    sinks = terms.of_rows(1, heads, new)  # [H, G*T, 1]
    if sinks is not None:
        sinks = sinks.detach().to(exact).view(1, heads, 1, -1, 1)
    top = at_least(top, sinks)
    top = top.masked_fill(top == float("-inf"), 0)
    # The second term is zero and has the gate's gradient, which a gate of 0 needs a bound for.
    past_weight = (biased - top).exp() + (gate - gate.detach()) * (past.detach() - top).clamp_max(OVERFLOW_CLIP).exp()
    recent_weight = (recent - top).exp()
    mass = past_weight.sum(-1, keepdim=True) + recent_weight.sum(-1, keepdim=True)
    if sinks is not None:
        mass = mass + (sinks - top).exp()
    mass = mass.masked_fill(mass == 0, 1)  # a query that attends to nothing gets zero
    output = torch.einsum("bhcqs,bhsd->bhcqd", (past_weight / mass).to(values.dtype), values)
    output = output + (recent_weight / mass).to(values.dtype) @ recent_values
    return output.transpose(1, 2).reshape(rows, query_heads, new, dim)
