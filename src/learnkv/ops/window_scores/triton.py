"""Window scores in two passes over the keys: the softmax's normalisers, then the weights, reduced as they are computed.

The kernels write one number per kv head and slot, or per query head and slot where heads are not reduced, or are
reduced after pooling and the two do not commute.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.device import processors
from learnkv.ops.softmax_terms import SoftmaxTerms, with_sinks
from learnkv.ops.softmax_terms.triton import cap, kernel_terms

_Sizes = tuple[int, int, tuple[tuple[int, ...], ...]]
_WAVES = 4  # programs per processor in the first pass


def window_scores(
    queries: Tensor,
    keys: Tensor,
    *,
    query_positions: Tensor,
    positions: Tensor,
    valid: Tensor,
    scaling: float,
    kernel_size: int,
    pooling: str,
    window_reduce: str,
    group_reduce: str,
    group_first: bool,
    terms: SoftmaxTerms,
    lse: Tensor | None,
) -> Tensor:
    """`window_scores` in Triton."""
    batch, heads, slots, dim = keys.shape
    group, window, apart = queries.shape[1] // heads, queries.shape[2], group_reduce == "none"
    shape = (batch, heads, group, slots) if apart else (batch, heads, slots)
    scores = torch.empty(shape, dtype=torch.float32, device=keys.device)
    if window == 0 or slots == 0:
        return scores.zero_()
    queries = queries if queries.stride(-1) == 1 else queries.contiguous()
    keys = keys if keys.stride(-1) == 1 else keys.contiguous()
    places = (query_positions.contiguous(), positions, valid)
    sizes = (slots, window, (queries.stride(), keys.stride(), positions.stride(), valid.stride()))
    constants = {
        "HEADS": heads,
        "GROUP": group,
        "DIM": dim,
        "BLOCK_D": max(triton.next_power_of_2(dim), 16),
        "UPCAST": keys.device.type == "cpu",
    }
    inputs = (queries, keys, *places)
    scale, softcap, sinks = kernel_terms(terms, scaling)
    if lse is None:
        lse = _normalisers(inputs, sizes, (scale, softcap), constants)
        lse = with_sinks(lse, None if sinks is None else sinks.unsqueeze(-1))

    # Means over slots and over heads may change places, with a maximum they may not.
    per_head = apart or (not group_first and kernel_size > 1 and "max" in (pooling, group_reduce))
    parts = group if per_head else 1
    attention = scores if kernel_size == 1 else scores.new_empty(batch, heads, parts, slots)
    tiles = {"BLOCK_N": 128, "BLOCK_W": min(max(triton.next_power_of_2(window), 16), 64)}
    tiles["num_warps"] = 8 if constants["BLOCK_D"] * keys.element_size() > 256 else 4
    how = {"MEAN": window_reduce == "mean", "GROUP_REDUCE": "none" if per_head else group_reduce}
    grid = (triton.cdiv(slots, tiles["BLOCK_N"]), batch * heads)
    _reduce_weights[grid](*inputs, lse.contiguous(), attention, scale, softcap, *sizes, **how, **tiles, **constants)
    if kernel_size > 1:
        tiles = {"BLOCK_N": 1024, "WINDOW": triton.next_power_of_2(window)}
        how = {"KERNEL": kernel_size, "MAX_SLOTS": pooling == "max", "PARTS": parts, "GROUP_REDUCE": group_reduce}
        _pool[(triton.cdiv(slots, 1024), batch * heads)](
            attention, *places, scores, *sizes, HEADS=heads, **how, **tiles
        )
    return scores


def _normalisers(
    inputs: tuple[Tensor, ...], sizes: _Sizes, scale: tuple[float, float | None], constants: dict[str, int]
) -> Tensor:
    """Natural log-sum-exp [B, H*G, W] of every query over the entries it attends to."""
    queries, keys = inputs[:2]
    rows, slots = keys.shape[0] * keys.shape[1], keys.shape[2]
    packed = constants["GROUP"] * queries.shape[2]
    block_m = min(max(triton.next_power_of_2(packed), 16), 128)
    block_n = 32 if constants["BLOCK_D"] * keys.element_size() > 256 else 64
    tiles, blocks = triton.cdiv(packed, block_m), triton.cdiv(slots, block_n)
    splits = min(triton.cdiv(_WAVES * processors(keys.device), tiles * rows), blocks)
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8 if block_m == 128 else 4, "num_stages": 3}
    partial = torch.empty(rows, splits, packed, dtype=torch.float32, device=keys.device)
    share = triton.cdiv(blocks, splits)
    _split_normalisers[(splits, tiles, rows)](*inputs, partial, *scale, *sizes, share, **options, **constants)
    lse = torch.empty(queries.shape[:3], dtype=torch.float32, device=keys.device)
    _join_normalisers[(triton.cdiv(packed, 128), rows)](partial, lse, splits, packed, BLOCK_M=128)
    return lse


@triton.jit
def _place(tensor, batch, head, slot, stride):
    """Pointers to the slots of one head; batch, head and slot are int64."""
    return tensor + batch * stride[0] + head * stride[1] + slot * stride[2]


@triton.jit
def _entries(keys, positions, valid, batch, head, slot, slots, strides, d, DIM: tl.constexpr, UPCAST: tl.constexpr):
    """Which of the slots are entries, their prompt positions, and their keys."""
    inside = slot < slots
    is_entry = inside & tl.load(_place(valid, batch, head, slot, strides[3]), inside, other=0)
    position = tl.load(_place(positions, batch, head, slot, strides[2]), is_entry, other=0)
    place = _place(keys, batch, head, slot, strides[1])[:, None] + d[None, :]
    k = tl.load(place, is_entry[:, None] & (d < DIM)[None, :], other=0)
    if UPCAST:
        k = k.to(tl.float32)
    return is_entry, position, k


@triton.jit
def _split_normalisers(
    queries,
    keys,
    query_positions,
    positions,
    valid,
    partial,
    scale,
    softcap,
    slots,
    window,
    strides,
    blocks,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Base-2 log-sum-exp of one tile of queries over one stretch of slots."""
    row = tl.program_id(2)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    packed = GROUP * window
    query_position = tl.load(query_positions + batch * window + m % window, m < packed, other=-1)
    source = (m // window * strides[0][1] + m % window * strides[0][2])[:, None] + d[None, :]
    is_query = (query_position >= 0)[:, None] & (d < DIM)[None, :]
    q = tl.load(queries + batch * strides[0][0] + head * GROUP * strides[0][1] + source, is_query, other=0)
    if UPCAST:
        q = q.to(tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    first = tl.program_id(0) * blocks
    for block in range(first, tl.minimum(first + blocks, tl.cdiv(slots, BLOCK_N))):
        slot = (block * BLOCK_N + n).to(tl.int64)
        is_entry, position, k = _entries(keys, positions, valid, batch, head, slot, slots, strides, d, DIM, UPCAST)
        scores = cap(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap)
        attended = is_entry[None, :] & (position[None, :] <= query_position[:, None]) & (query_position >= 0)[:, None]
        scores = tl.where(attended, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = higher
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
    tl.store(partial + (row.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * packed + m, log_mass, m < packed)


@triton.jit
def _join_normalisers(partial, lse, splits, packed, BLOCK_M: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    for split in range(splits):
        part = tl.load(partial + (row * splits + split) * packed + m, m < packed, other=float("-inf"))
        higher = tl.maximum(top, part)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        mass = mass * tl.exp2(top - base) + tl.exp2(part - base)
        top = higher
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
    tl.store(lse + row * packed + m, log_mass / 1.4426950408889634, m < packed)


@triton.jit
def _reduce_weights(
    queries,
    keys,
    query_positions,
    positions,
    valid,
    lse,
    attention,
    scale,
    softcap,
    slots,
    window,
    strides,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
    MEAN: tl.constexpr,
    GROUP_REDUCE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Softmax weights of one block of slots, summed over the window and, unless GROUP_REDUCE is none, over heads."""
    row = tl.program_id(1)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    slot = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    is_entry, position, k = _entries(keys, positions, valid, batch, head, slot, slots, strides, d, DIM, UPCAST)
    inside = slot < slots

    tiles = tl.cdiv(window, BLOCK_W)
    queries_in_window = 0
    attending = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(tiles):
        w = tile * BLOCK_W + tl.arange(0, BLOCK_W)
        query_position = tl.load(query_positions + batch * window + w, w < window, other=-1)
        queries_in_window += tl.sum((query_position >= 0).to(tl.int32))
        attended = is_entry[:, None] & (position[:, None] <= query_position[None, :]) & (query_position >= 0)[None, :]
        attending += tl.sum(attended.to(tl.int32), 1)
    queries_in_window = tl.maximum(queries_in_window, 1).to(tl.float32)
    fewer = queries_in_window / tl.maximum(attending, 1).to(tl.float32)

    total = tl.zeros([BLOCK_N], tl.float32)
    summed = tl.zeros([BLOCK_N], tl.float32)
    for step in range(GROUP * tiles):
        member, tile = step // tiles, step % tiles
        w = tile * BLOCK_W + tl.arange(0, BLOCK_W)
        query_position = tl.load(query_positions + batch * window + w, w < window, other=-1)
        query = head * GROUP + member
        source = queries + batch * strides[0][0] + query * strides[0][1] + (w * strides[0][2])[:, None] + d[None, :]
        q = tl.load(source, (query_position >= 0)[:, None] & (d < DIM)[None, :], other=0)
        if UPCAST:
            q = q.to(tl.float32)
        log_mass = tl.load(lse + (batch * HEADS * GROUP + query) * window + w, w < window, other=0)
        scores = cap(tl.dot(k, tl.trans(q), input_precision="ieee") * scale, softcap)
        attended = is_entry[:, None] & (position[:, None] <= query_position[None, :]) & (query_position >= 0)[None, :]
        weight = tl.where(attended, tl.exp2(scores - (log_mass * 1.4426950408889634)[None, :]), 0.0)
        summed += tl.sum(weight, 1)
        if tile == tiles - 1:
            mean_weight = summed * fewer
            if MEAN:
                mean_weight = mean_weight / queries_in_window
            if GROUP_REDUCE == "none":
                tl.store(attention + (row.to(tl.int64) * GROUP + member) * slots + slot, mean_weight, inside)
            elif GROUP_REDUCE == "max":
                total = tl.maximum(total, mean_weight)
            else:
                total += mean_weight
            summed = tl.zeros([BLOCK_N], tl.float32)
    if GROUP_REDUCE != "none":
        if GROUP_REDUCE == "mean":
            total = total / GROUP
        tl.store(attention + row.to(tl.int64) * slots + slot, total, inside)


@triton.jit
def _pool(
    attention,
    query_positions,
    positions,
    valid,
    scores,
    slots,
    window,
    strides,
    HEADS: tl.constexpr,
    PARTS: tl.constexpr,
    KERNEL: tl.constexpr,
    MAX_SLOTS: tl.constexpr,
    GROUP_REDUCE: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Mean or maximum over neighbouring slots on the same side of the window's first query, then over heads.

    With GROUP_REDUCE none, heads are not reduced.
    """
    row = tl.program_id(1)
    batch, head = (row // HEADS).to(tl.int64), (row % HEADS).to(tl.int64)
    w = tl.arange(0, WINDOW)
    query_position = tl.load(query_positions + batch * window + w, w < window, other=-1)
    window_start = tl.min(tl.where(query_position >= 0, query_position, 0x7FFFFFFFFFFFFFFF))
    place = positions + batch * strides[2][0] + head * strides[2][1]
    exists = valid + batch * strides[3][0] + head * strides[3][1]
    slot = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inside = slot < slots
    recent = tl.load(place + slot * strides[2][2], inside, other=0) >= window_start
    total = tl.zeros([BLOCK_N], tl.float32)
    for part in range(PARTS):
        pooled = tl.full([BLOCK_N], float("-inf") if MAX_SLOTS else 0.0, tl.float32)
        for offset in range(KERNEL):
            near = slot + offset - KERNEL // 2
            among = inside & (near >= 0) & (near < slots)
            among = among & tl.load(exists + near * strides[3][2], among, other=0)
            among = among & ((tl.load(place + near * strides[2][2], among, other=0) >= window_start) == recent)
            value = tl.load(attention + (row.to(tl.int64) * PARTS + part) * slots + near, among, other=0)
            if MAX_SLOTS:
                pooled = tl.maximum(pooled, tl.where(among, value, float("-inf")))
            else:
                pooled += value
        if not MAX_SLOTS:
            pooled = pooled / KERNEL
        if GROUP_REDUCE == "none":
            valid_slot = tl.load(exists + slot * strides[3][2], inside, other=0)
            tl.store(
                scores + (row.to(tl.int64) * PARTS + part) * slots + slot, tl.where(valid_slot, pooled, 0.0), inside
            )
        elif GROUP_REDUCE == "max":
            total = tl.maximum(total, pooled)
        else:
            total += pooled
    if GROUP_REDUCE != "none":
        if PARTS > 1 and GROUP_REDUCE == "mean":
            total = total / PARTS
        valid_slot = tl.load(exists + slot * strides[3][2], inside, other=0)
        tl.store(scores + row.to(tl.int64) * slots + slot, tl.where(valid_slot, total, 0.0), inside)
