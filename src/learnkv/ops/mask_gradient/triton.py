"""Three kernels without atomics: one per query, one per entry of the prompt, one per slot of the tail.

The first also computes every query's largest score, which bounds the second's weights of evicted entries.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.arguments import Ragged, Tail
from learnkv.ops.mask_gradient import OVERFLOW_CLIP
from learnkv.ops.softmax_terms import SoftmaxTerms
from learnkv.ops.softmax_terms.triton import cap, first_logits, kernel_terms, steepen

_LOG2E = 1.4426950408889634


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
    """`mask_gradient` in Triton."""
    rows, query_heads, new, dim = query.shape
    batch, heads, slots, _ = keys.shape
    tail_keys, tail_values, tail_mask, _ = tail
    tail_slots, packed = tail_keys.shape[2], query_heads // heads * new
    assert all(part.is_contiguous() for part in kept[:4])
    assert kept_gates is None or kept_gates.is_contiguous()
    grad, query, keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (grad, query, keys, values))
    output, lse = output.contiguous(), lse.contiguous()
    # Tokens must follow each other as in the pool; a decode buffer has that layout, other tails are copied.
    if tail_keys.stride() != tail_values.stride() or tail_keys.stride()[2:] != (dim, 1):
        tail_keys, tail_values = tail_keys.contiguous(), tail_values.contiguous()
    mask = None if tail_mask is None else tail_mask.expand(rows, 1, new, tail_slots)

    capped = terms.softcap is not None
    by_query, by_entry, by_slot = (_tiles(packed, dim, query.element_size(), outputs, capped) for outputs in (1, 0, 2))
    shared = {
        "HEADS": heads,
        "DIM": dim,
        "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "UPCAST": query.device.type == "cpu",
    }
    queries = (grad, query)
    recent = (tail_keys, tail_values, mask)
    scale, softcap, sinks = kernel_terms(terms, scaling)
    sizes = (scale, softcap, tail_slots, new, packed)
    strides = (grad.stride(), query.stride(), tail_keys.stride(), None if mask is None else mask.stride())
    query_gradient = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    ceiling, delta = (torch.empty(lse.shape, dtype=torch.float32, device=query.device) for _ in range(2))
    grid = (triton.cdiv(packed, by_query["BLOCK_M"]), rows * heads)
    _query_gradient[grid](
        *queries,
        output,
        lse,
        kept.keys,
        kept.values,
        kept_gates,
        sinks,
        kept.offset,
        kept.length,
        *recent,
        query_gradient,
        ceiling,
        delta,
        *sizes,
        scaling,
        OVERFLOW_CLIP * _LOG2E,
        strides,
        GATED=kept_gates is not None,
        HAS_MASK=mask is not None,
        **shared,
        **by_query,
    )
    gradient = torch.empty(batch, heads, slots, dtype=torch.float32, device=query.device)
    _entry_gradient[(triton.cdiv(slots, by_entry["BLOCK_N"]), batch * heads)](
        *queries,
        lse,
        ceiling,
        delta,
        keys,
        values,
        gradient,
        scale,
        softcap,
        slots,
        rows // batch,
        new,
        packed,
        (grad.stride(), query.stride(), keys.stride(), values.stride()),
        **shared,
        **by_entry,
    )
    tail_gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (tail_keys, tail_values)]
    _slot_gradient[(triton.cdiv(tail_slots, by_slot["BLOCK_N"]), rows * heads)](
        *queries,
        lse,
        delta,
        *recent,
        *tail_gradients,
        *sizes,
        scaling,
        strides,
        HAS_MASK=mask is not None,
        **shared,
        **by_slot,
    )
    return gradient, query_gradient, tail_gradients[0], tail_gradients[1]


def _tiles(packed: int, dim: int, element_size: int, outputs: int, capped: bool) -> dict[str, int]:
    """Tile sizes and launch options of a kernel that gathers `outputs` tiles of vectors: what stays in registers."""
    block_d = max(triton.next_power_of_2(dim), 16)
    wide = block_d > 128 or element_size == 4
    small = wide or outputs * block_d >= 256 or (capped and outputs == 2)  # slopes take as much room as weights
    many = wide or outputs * block_d >= 128
    if capped and not wide and block_d <= 64:
        many = outputs == 1
    return {
        "BLOCK_M": min(max(triton.next_power_of_2(packed), 16), 32 if small else 64),
        "BLOCK_N": 32 if wide else 64,
        "num_warps": 8 if many else 4,
        "num_stages": 2,
    }


@triton.jit
def _queries(
    tensor, batch, head, m, new, packed, stride, DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """Packed queries m, member of the group and token, of one kv head: [M, D]; batch and head are int64."""
    d = tl.arange(0, BLOCK_D)
    place = batch * stride[0] + head * (packed // new) * stride[1]
    source = tensor + place + (m // new * stride[1] + m % new * stride[2])[:, None] + d[None, :]
    queries = tl.load(source, (m < packed)[:, None] & (d < DIM)[None, :], other=0)
    if UPCAST:
        queries = queries.to(tl.float32)
    return queries


@triton.jit
def _log_mass(lse, index, valid):
    """Base-2 log-sum-exp of queries, and infinity for those that attend to nothing and have no weights."""
    log_mass = tl.load(lse + index, valid, other=float("inf")) * 1.4426950408889634
    return tl.where(log_mass == float("-inf"), float("inf"), log_mass)


@triton.jit(do_not_specialize=["tail", "new", "packed"])
def _query_gradient(
    grad,
    query,
    output,
    lse,
    keys,
    values,
    gates,
    sinks,
    offset,
    length,
    tail_keys,
    tail_values,
    tail_mask,
    query_gradient,
    ceiling,
    delta,
    scale,
    softcap,
    tail,
    new,
    packed,
    scaling,
    clip,
    strides,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    GATED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of one tile of queries over segment and tail, <dL/do, o>, and the largest score plus the clip."""
    row = tl.program_id(1)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token = m % new
    is_query = m < packed
    index = row.to(tl.int64) * packed + m
    where = index[:, None] * DIM + d[None, :]
    inside = is_query[:, None] & (d < DIM)[None, :]
    g = _queries(grad, batch, head, m, new, packed, strides[0], DIM, BLOCK_D, UPCAST)
    q = _queries(query, batch, head, m, new, packed, strides[1], DIM, BLOCK_D, UPCAST)
    o = tl.load(output + where, inside, other=0)
    back = tl.sum(g.to(tl.float32) * o.to(tl.float32), 1)
    log_mass = _log_mass(lse, index, is_query)

    kept = tl.load(length + row).to(tl.int32)
    kept_blocks = tl.cdiv(kept, BLOCK_N)
    first = tl.load(offset + row).to(tl.int64)
    recent = batch * strides[2][0] + head * strides[2][1]
    tile = n[:, None] * DIM + d[None, :]
    top, _ = first_logits(sinks, head * (packed // new) + m // new, is_query, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for block in range(0, kept_blocks + tl.cdiv(tail, BLOCK_N)):
        in_tail = block >= kept_blocks
        begin = tl.where(in_tail, block - kept_blocks, block) * BLOCK_N
        slot = begin + n
        valid = slot < tl.where(in_tail, tail, kept)
        present = valid[:, None] & (d < DIM)[None, :]
        shift = tl.where(in_tail, recent, first * DIM) + begin * DIM
        k = tl.load(tl.where(in_tail, tail_keys, keys) + shift + tile, present, 0)
        v = tl.load(tl.where(in_tail, tail_values, values) + shift + tile, present, 0)
        if UPCAST:
            k, v = k.to(tl.float32), v.to(tl.float32)
        attended = valid[None, :] & (~in_tail | (slot[None, :] <= tail - new + token[:, None]))
        if HAS_MASK:
            mask_entry = (
                tail_mask + batch * strides[3][0] + (token * strides[3][2])[:, None] + (slot * strides[3][3])[None, :]
            )
            attended = valid[None, :] & (
                ~in_tail | tl.load(mask_entry, in_tail & valid[None, :] & is_query[:, None], other=0)
            )
        capped = cap(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap)
        scores = capped
        if GATED:
            gate = tl.load(gates + first + slot, valid & ~in_tail, other=1).to(tl.float32)
            scores += tl.log2(gate)[None, :]
        scores = tl.where(attended, scores, float("-inf"))
        top = tl.maximum(top, tl.max(scores, 1))
        weight = tl.exp2(scores - log_mass[:, None])
        slope = weight * (tl.dot(g, tl.trans(v), input_precision="ieee") - back[:, None])
        slope = steepen(slope, capped, softcap)
        acc = tl.dot(slope.to(k.dtype), k, acc, input_precision="ieee")
    tl.store(query_gradient + where, (acc * scaling).to(query_gradient.dtype.element_ty), inside)
    tl.store(ceiling + index, top + clip, is_query)
    tl.store(delta + index, back, is_query)


@triton.jit(do_not_specialize=["slots", "copies", "new", "packed"])
def _entry_gradient(
    grad,
    query,
    lse,
    ceiling,
    delta,
    keys,
    values,
    gradient,
    scale,
    softcap,
    slots,
    copies,
    new,
    packed,
    strides,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of the mask of one block of a prompt's entries, over the queries of all of its continuations."""
    row = tl.program_id(1)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = slot < slots
    present = valid[:, None] & (d < DIM)[None, :]
    source = slot.to(tl.int64)[:, None]
    k = tl.load(keys + batch * strides[2][0] + head * strides[2][1] + source * strides[2][2] + d[None, :], present, 0)
    v = tl.load(values + batch * strides[3][0] + head * strides[3][1] + source * strides[3][2] + d[None, :], present, 0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    tiles = tl.cdiv(packed, BLOCK_M)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for step in range(0, copies * tiles):
        m = step % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        is_query = m < packed
        query_row = batch * copies + step // tiles
        g = _queries(grad, query_row, head, m, new, packed, strides[0], DIM, BLOCK_D, UPCAST)
        q = _queries(query, query_row, head, m, new, packed, strides[1], DIM, BLOCK_D, UPCAST)
        index = (query_row * HEADS + head) * packed + m
        log_mass = _log_mass(lse, index, is_query)
        highest = tl.load(ceiling + index, is_query, other=0)
        back = tl.load(delta + index, is_query, other=0)
        scores = cap(tl.dot(k, tl.trans(q), input_precision="ieee") * scale, softcap)
        scores = tl.minimum(scores, highest[None, :])
        weight = tl.exp2(scores - log_mass[None, :])
        acc += tl.sum(weight * (tl.dot(v, tl.trans(g), input_precision="ieee") - back[None, :]), 1)
    tl.store(gradient + row.to(tl.int64) * slots + slot, acc, valid)


@triton.jit(do_not_specialize=["tail", "new", "packed"])
def _slot_gradient(
    grad,
    query,
    lse,
    delta,
    tail_keys,
    tail_values,
    tail_mask,
    keys_gradient,
    values_gradient,
    scale,
    softcap,
    tail,
    new,
    packed,
    scaling,
    strides,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the keys and values of one block of the tail, over the queries of its row."""
    row = tl.program_id(1)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    slot = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    valid = slot < tail
    present = valid[:, None] & (d < DIM)[None, :]
    source = batch * strides[2][0] + head * strides[2][1] + slot[:, None] * DIM + d[None, :]
    k = tl.load(tail_keys + source, present, other=0)
    v = tl.load(tail_values + source, present, other=0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    keys_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    values_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(0, tl.cdiv(packed, BLOCK_M)):
        m = step * BLOCK_M + tl.arange(0, BLOCK_M)
        is_query = m < packed
        token = m % new
        g = _queries(grad, batch, head, m, new, packed, strides[0], DIM, BLOCK_D, UPCAST)
        q = _queries(query, batch, head, m, new, packed, strides[1], DIM, BLOCK_D, UPCAST)
        index = row.to(tl.int64) * packed + m
        log_mass = _log_mass(lse, index, is_query)
        back = tl.load(delta + index, is_query, other=0)
        attended = valid[:, None] & (slot[:, None] <= tail - new + token[None, :])
        if HAS_MASK:
            mask_entry = (
                tail_mask + batch * strides[3][0] + (slot * strides[3][3])[:, None] + (token * strides[3][2])[None, :]
            )
            attended = tl.load(mask_entry, valid[:, None] & is_query[None, :], other=0)
        scores = cap(tl.dot(k, tl.trans(q), input_precision="ieee") * scale, softcap)
        weight = tl.exp2(tl.where(attended, scores, float("-inf")) - log_mass[None, :])
        slope = weight * (tl.dot(v, tl.trans(g), input_precision="ieee") - back[None, :])
        slope = steepen(slope, scores, softcap)
        values_acc = tl.dot(weight.to(g.dtype), g, values_acc, input_precision="ieee")
        keys_acc = tl.dot(slope.to(q.dtype), q, keys_acc, input_precision="ieee")
    where = (row.to(tl.int64) * tail + slot)[:, None] * DIM + d[None, :]
    tl.store(keys_gradient + where, (keys_acc * scaling).to(keys_gradient.dtype.element_ty), present)
    tl.store(values_gradient + where, values_acc.to(values_gradient.dtype.element_ty), present)
