"""Gated attention in plain, differentiable operations; softmax in float32."""

import torch
from torch import Tensor

from learnkv.ops.decode_attention.reference import causal_tail

OVERFLOW_CLIP = 4.0


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

    # The continuations of one prompt are queries of one attention: the prompt's keys are never repeated.
    packed = query.reshape(batch, copies, heads, group * new, dim).transpose(1, 2)
    past = torch.einsum("bhcqd,bhsd->bhcqs", packed, keys).float() * scaling
    tail_shape = (batch, copies, heads, tail, dim)
    recent_keys = tail_keys.reshape(tail_shape).transpose(1, 2)
    recent_values = tail_values.reshape(tail_shape).transpose(1, 2)
    recent = (packed @ recent_keys.transpose(-1, -2)).float() * scaling
    seen = tail_mask if tail_mask is not None else causal_tail(new, tail, query.device).expand(rows, 1, new, tail)
    seen = seen.view(batch, 1, copies, 1, new, tail).expand(-1, -1, -1, group, -1, -1)
    recent = recent.masked_fill(~seen.reshape(batch, 1, copies, group * new, tail), float("-inf"))

    gate = gates.float().view(batch, heads, 1, 1, slots)
    kept = past.detach().masked_fill(gate.detach() < 0.5, float("-inf")).amax(-1, keepdim=True)
    top = torch.maximum(kept, recent.detach().amax(-1, keepdim=True))
    top = top.masked_fill(top == float("-inf"), 0)
    past_weight = gate * (past - top).clamp_max(OVERFLOW_CLIP).exp()
    recent_weight = (recent - top).exp()
    mass = past_weight.sum(-1, keepdim=True) + recent_weight.sum(-1, keepdim=True)
    output = torch.einsum("bhcqs,bhsd->bhcqd", (past_weight / mass).to(values.dtype), values)
    output = output + (recent_weight / mass).to(values.dtype) @ recent_values
    return output.transpose(1, 2).reshape(rows, query_heads, new, dim)
