"""Gated attention: the forward reads one more number per entry, the backward is that of attention to kept entries."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.mask_gradient import mask_gradient
from learnkv.ops.softmax_terms import SoftmaxTerms
from learnkv.ops.softmax_terms.triton import cap, first_logits, kernel_terms


def gated_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    tail: Tail,
    scaling: float,
    terms: SoftmaxTerms,
) -> Tensor:
    """`gated_attention` in Triton."""
    output: Tensor = _GatedAttention.apply(
        query, gates, tail.keys, tail.values, keys.contiguous(), values.contiguous(), tail.mask, scaling, terms
    )
    return output


class _GatedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        gates: Tensor,
        tail_keys: Tensor,
        tail_values: Tensor,
        keys: Tensor,
        values: Tensor,
        tail_mask: Tensor | None,
        scaling: float,
        terms: SoftmaxTerms,
    ) -> Tensor:
        tail = Tail(tail_keys, tail_values, tail_mask)
        output, lse = _forward(query, keys, values, gates, tail, scaling, terms)
        ctx.save_for_backward(query, gates, tail_keys, tail_values, keys, values, tail_mask, output, lse)
        ctx.scaling, ctx.terms = scaling, terms
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, gates, tail_keys, tail_values, keys, values, tail_mask, output, lse = ctx.saved_tensors
        batch, heads, slots, dim = keys.shape
        # All of the prompt was read: its pool is the prompt itself.
        prompt = torch.arange(query.shape[0], device=keys.device).unsqueeze(-1) // (query.shape[0] // batch)
        offset = ((prompt * heads + torch.arange(heads, device=keys.device)) * slots).flatten()
        whole = Ragged(keys.view(-1, dim), values.view(-1, dim), offset, torch.full_like(offset, slots), slots)
        mask, query_gradient, *tails = mask_gradient(
            grads[0],
            query,
            output,
            lse,
            keys,
            values,
            whole,
            Tail(tail_keys, tail_values, tail_mask),
            ctx.scaling,
            gates.contiguous().view(-1),
            ctx.terms,
            impl="triton",
        )
        return query_gradient, mask.to(gates.dtype), *tails, None, None, None, None, None


def _forward(
    query: Tensor, keys: Tensor, values: Tensor, gates: Tensor, tail: Tail, scaling: float, terms: SoftmaxTerms
) -> tuple[Tensor, Tensor]:
    """Output [B*C, H*G, T, D] and log-sum-exp [B*C, H*G, T]."""
    rows, query_heads, new, dim = query.shape
    batch, heads, slots, _ = keys.shape
    tail_keys, tail_values, tail_mask, _ = tail
    tail_slots, packed = tail_keys.shape[2], query_heads // heads * new
    query = query if query.stride(-1) == 1 else query.contiguous()
    if tail_keys.stride() != tail_values.stride() or tail_keys.stride()[2:] != (dim, 1):
        tail_keys, tail_values = tail_keys.contiguous(), tail_values.contiguous()
    mask = None if tail_mask is None else tail_mask.expand(rows, 1, new, tail_slots)
    block_d = max(triton.next_power_of_2(dim), 16)
    most, block_n = (32, 16) if query.element_size() == 4 else (64, 32) if block_d > 128 else (128, 64)
    block_m = min(max(triton.next_power_of_2(packed), 16), most)
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    _attend_gated[(triton.cdiv(packed, block_m), rows * heads)](
        query,
        keys,
        values,
        gates.contiguous(),
        tail_keys,
        tail_values,
        mask,
        output,
        lse,
        *kernel_terms(terms, scaling),
        slots,
        rows // batch,
        tail_slots,
        new,
        packed,
        (query.stride(), tail_keys.stride(), None if mask is None else mask.stride()),
        HEADS=heads,
        DIM=dim,
        HAS_MASK=mask is not None,
        UPCAST=query.device.type == "cpu",
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        num_warps=8 if block_n < 64 or block_m * block_d >= 8192 else 4,
        num_stages=2 if block_n < 64 else 3,
    )
    return output, lse


@triton.jit
def _softmax_step(q, keys, values, source, present, bias, top, mass, acc, scale, softcap, UPCAST: tl.constexpr):
    """Take one block of entries, whose scores get `bias`, into the running softmax."""
    k = tl.load(keys + source, present, other=0)
    v = tl.load(values + source, present, other=0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = cap(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap) + bias
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    weight = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return higher, mass * shrink + tl.sum(weight, 1), acc


@triton.jit(do_not_specialize=["slots", "copies", "tail", "new", "packed"])
def _attend_gated(
    query,
    keys,
    values,
    gates,
    tail_keys,
    tail_values,
    tail_mask,
    output,
    lse,
    scale,
    softcap,
    sinks,
    slots,
    copies,
    tail,
    new,
    packed,
    strides,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of queries of one kv head over all of the prompt's entries and the tail."""
    row = tl.program_id(1)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token = m % new
    is_query = m < packed
    inside = is_query[:, None] & (d < DIM)[None, :]
    query_row = batch * strides[0][0] + head * (packed // new) * strides[0][1]
    place = query_row + (m // new * strides[0][1] + token * strides[0][2])[:, None] + d[None, :]
    q = tl.load(query + place, inside, other=0)
    if UPCAST:
        q = q.to(tl.float32)

    first = (batch // copies * HEADS + head) * slots
    top, mass = first_logits(sinks, head * (packed // new) + m // new, is_query, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in range(0, slots, BLOCK_N):
        valid = begin + n < slots
        bias = tl.log2(tl.load(gates + first + begin + n, valid, other=0).to(tl.float32))[None, :]
        source = (first + begin) * DIM + n[:, None] * DIM + d[None, :]
        present = valid[:, None] & (d < DIM)[None, :]
        top, mass, acc = _softmax_step(q, keys, values, source, present, bias, top, mass, acc, scale, softcap, UPCAST)
    recent = batch * strides[1][0] + head * strides[1][1]
    for begin in range(0, tail, BLOCK_N):
        slot = begin + n
        valid = slot < tail
        attended = slot[None, :] <= tail - new + token[:, None]
        if HAS_MASK:
            mask_entry = (
                tail_mask + batch * strides[2][0] + (token * strides[2][2])[:, None] + (slot * strides[2][3])[None, :]
            )
            attended = tl.load(mask_entry, valid[None, :] & is_query[:, None], other=0)
        bias = tl.where(attended & valid[None, :], 0.0, float("-inf"))
        source = recent + slot[:, None] * DIM + d[None, :]
        present = valid[:, None] & (d < DIM)[None, :]
        top, mass, acc = _softmax_step(
            q, tail_keys, tail_values, source, present, bias, top, mass, acc, scale, softcap, UPCAST
        )
    acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
    target = row.to(tl.int64) * packed + m
    tl.store(output + target[:, None] * DIM + d[None, :], acc.to(output.dtype.element_ty), inside)
    tl.store(lse + target, log_mass / 1.4426950408889634, is_query)
