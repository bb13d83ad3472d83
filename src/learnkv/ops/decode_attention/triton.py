"""Ragged split-KV decode attention: equal shares of all blocks of all rows, partial results merged in a fixed order.

Every program takes a contiguous stretch of the blocks of all rows, segments and tails alike, so that the longest row
does not decide the run time; where pages are read, a row's blocks are those of its list. All query heads of a kv head
are one tile. Programs compute their share on the device from `length`: no host sync, and a CUDA graph stays valid while
lengths change.

Tiers of fewer bits are further blocks of their rows. A block's codes c are integers on the tensor cores: a key is
scale * c + zero, so a score is scale * (q . c) + zero * sum(q), and a value's scale multiplies its weight. Queries in
the basis of the tiers are made once before the launch; what tiers add to the output is summed apart and turned back.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.arguments import Codes, Pages, Ragged, Tail, Tier
from learnkv.ops.basis import rotated
from learnkv.ops.device import processors
from learnkv.ops.quantize.triton import MAGIC, load_codes, packed_words
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms
from learnkv.ops.softmax_terms.triton import cap, first_logits, kernel_terms
from learnkv.ops.tail_slots import tail_slots

_PROGRAMS_PER_PROCESSOR = 2  # two of them fit into shared memory, and one wave leaves nothing to schedule


def decode_attention(
    query: Tensor,
    kept: Ragged,
    tail: Tail,
    scaling: float,
    pages: Pages | None,
    tiers: Sequence[Tier] = (),
    terms: SoftmaxTerms = NO_TERMS,
    needs_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """`decode_attention` in Triton, with the log-sum-exp in any case: it is there."""
    batch, query_heads, new, dim = query.shape
    tail_keys, tail_values, _, used = tail
    slots = tail_keys.shape[2]
    heads = tail_keys.shape[1] if pages is None else pages.numbers.shape[0] // batch  # of which each is one row of work
    rows, packed = batch * heads, query_heads // heads * new
    assert slots > 0, "the tail ends with the new tokens"
    assert all(part.is_contiguous() for part in kept[:4])
    query = query if query.stride(-1) == 1 else query.contiguous()
    # Tokens must follow each other as in the pool; a decode buffer has that layout, other tails are copied.
    if tail_keys.stride() != tail_values.stride() or tail_keys.stride()[2:] != (dim, 1):
        tail_keys, tail_values = tail_keys.contiguous(), tail_values.contiguous()
    mask = None if tail.mask is None else tail.mask.expand(batch, 1, new, slots)
    order = count = None
    if pages is not None:
        assert pages.numbers.is_contiguous()
        if mask is not None:
            (order, count), mask = tail_slots(mask[:, 0, 0], used), None

    key_basis, value_basis = (tiers[0].key_basis, tiers[0].value_basis) if tiers else (None, None)
    # [R, G*T, D] in the order of the output, as batches of heads.
    turned = query if key_basis is None else rotated(query.reshape(rows, packed, dim), key_basis).view(query.shape)
    bases = 1 if value_basis is None else 2  # of the output: the turned part beside the other
    levels, contents = _contents(tiers)

    shape = _tiles(packed, dim, query.element_size(), levels)
    tiles = triton.cdiv(packed, shape["BLOCK_M"])
    programs = max(_PROGRAMS_PER_PROCESSOR * processors(query.device) // tiles, 1)
    stored = query.dtype if bases == 1 else torch.float32
    output = torch.empty(batch, query_heads, new, bases * dim, dtype=stored, device=query.device)
    lse = torch.empty(batch, query_heads, new, dtype=torch.float32, device=query.device)
    # Of a program's rows only the first and the last can be shared with others.
    partial = torch.empty(programs * 2, packed, bases * dim, dtype=torch.float32, device=query.device)
    partial_lse = torch.empty(programs * 2, packed, dtype=torch.float32, device=query.device)
    table = {
        "ROWS": triton.next_power_of_2(rows),
        "HAS_LENGTH": used is not None,
        "PAGE": 0 if pages is None else pages.size,
        "TIERS": len(tiers),
    }
    listed = 0 if pages is None else pages.numbers.shape[1]
    lengths = tuple(tier.length for tier in tiers) or None
    _attend[(programs, tiles)](
        query,
        turned,
        *kept[:4],
        tail_keys,
        tail_values,
        mask,
        used,
        None if pages is None else pages.numbers,
        order,
        count,
        lengths,
        contents or None,
        output,
        lse,
        partial,
        partial_lse,
        *kernel_terms(terms, scaling),
        MAGIC,
        rows,
        slots,
        listed,
        new,
        packed,
        query.stride(),
        turned.stride(),
        tail_keys.stride(),
        None if mask is None else mask.stride(),
        HEADS=heads,
        SHARE=heads // tail_keys.shape[1],
        DIM=dim,
        HAS_SLOTS=order is not None,
        HAS_MASK=mask is not None,
        LEVELS=levels,
        BASES=bases,
        UPCAST=query.device.type == "cpu",
        **table,
        **shape,
    )
    if programs > 1:
        _merge[(rows, packed)](
            kept.length,
            used,
            lengths,
            output,
            lse,
            partial,
            partial_lse,
            programs,
            rows,
            slots,
            listed,
            packed,
            DIM=bases * dim,
            BLOCK_N=shape["BLOCK_N"],
            BLOCK_D=max(triton.next_power_of_2(bases * dim), 16),
            **table,
        )
    if value_basis is None:
        return output, lse
    plain, turned = output.view(rows, packed, 2, dim).unbind(2)
    output = torch.baddbmm(plain, turned, value_basis.mT.expand(rows, dim, dim))
    return output.to(query.dtype).view(query.shape), lse


def _contents(tiers: Sequence[Tier]) -> tuple[tuple[int, ...], tuple[tuple[Tensor | None, ...], ...]]:
    """Of every tier: bits of a key, of its words, of a value and of its words; and all tensors."""
    levels: list[int] = []
    contents = []
    for tier in tiers:
        keys, values = _vectors(tier.keys), _vectors(tier.values)
        levels += [*keys[0], *values[0]]
        contents.append((tier.offset, *keys[1], *values[1]))
    return tuple(levels), tuple(contents)


def _vectors(part: Codes | Tensor) -> tuple[tuple[int, int], tuple[Tensor, Tensor | None, Tensor | None]]:
    """Bits of a number and of a word, and words, scale and zero; vectors that are no codes have 16 bits."""
    if isinstance(part, Tensor):
        assert part.is_contiguous()
        return (16, 16), (part, None, None)
    assert all(tensor.is_contiguous() for tensor in part[:3])
    words, word = packed_words(part.codes)
    return (part.bits, word), (words, part.scale, part.zero)


def _tiles(packed: int, dim: int, element_size: int, levels: tuple[int, ...]) -> dict[str, int]:
    """Tile sizes and launch options: what stays in registers and leaves room for two programs per processor."""
    block_d = max(triton.next_power_of_2(dim), 16)
    most, large = 64, 8192
    if levels:  # a second accumulator, and what is decoded: fewer queries at once, and more threads to hold them
        most, large = (32 if block_d <= 128 else 16), 4096
    block_m = min(max(triton.next_power_of_2(packed), 16), most)
    bytewise = 8 in levels[1::2]  # words of a byte, of which threads hold few codes
    many = len(levels) > 16  # five tiers: with wide blocks their addresses spill on sm_80
    narrow = block_d * element_size > 256 or (bool(levels) and (block_m > 16 or bytewise or many))
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": 32 if narrow else 64,
        "BLOCK_D": block_d,
        "num_warps": 8 if block_m * block_d >= large or (bool(levels) and element_size == 4) else 4,
        "num_stages": 3,
    }


@triton.jit
def _blocks(
    length,
    tail_length,
    lengths,
    rows,
    tail,
    listed,
    ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Blocks of every row [ROWS], and the slots of the tail in use."""
    row = tl.arange(0, ROWS)
    used = tail
    if HAS_LENGTH:
        used = tl.load(tail_length).to(tl.int32)
    if PAGE:
        blocks = tl.where(row < rows, tl.cdiv(listed * PAGE, BLOCK_N), 0)
    else:
        kept = tl.load(length + row, mask=row < rows, other=0).to(tl.int32)
        blocks = tl.where(row < rows, tl.cdiv(kept, BLOCK_N) + tl.cdiv(used, BLOCK_N), 0)
    for tier in tl.static_range(TIERS):
        blocks += tl.cdiv(tl.load(lengths[tier] + row, mask=row < rows, other=0).to(tl.int32), BLOCK_N)
    return blocks, used


@triton.jit
def _load_vectors(
    words,
    first,
    valid,
    magic,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes [BLOCK_N, BLOCK_D] of the vectors from `first` on, or the vectors themselves."""
    if BITS == 16:
        n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        present = valid[:, None] & (d < DIM)[None, :]
        source = words + first * DIM + n[:, None] * DIM + d[None, :]
        vectors = tl.load(source, present, 0, eviction_policy="evict_first")
    else:
        width: tl.constexpr = (DIM * BITS + WORD - 1) // WORD
        vectors = load_codes(words + first * width, valid, magic, width, BITS, WORD, BLOCK_N, BLOCK_D)
    return vectors


@triton.jit
def _load_steps(scale, zero, first, valid, BITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Scales and zeros [BLOCK_N] of the vectors from `first` on; 1 and 0 for what is no code."""
    if BITS == 16:
        step, low = tl.full([BLOCK_N], 1, tl.float32), tl.zeros([BLOCK_N], tl.float32)
    else:
        n = tl.arange(0, BLOCK_N)
        step = tl.where(valid, tl.load(scale + first + n, valid, other=0).to(tl.float32), 1)
        low = tl.load(zero + first + n, valid, other=0).to(tl.float32)
    return step, low


@triton.jit
def _attend_tier(
    q,
    tier,
    row,
    entries,
    begin,
    end,
    scale,
    softcap,
    magic,
    top,
    mass,
    acc,
    shift,
    KEY_BITS: tl.constexpr,
    KEY_WORD: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    VALUE_WORD: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention to the blocks `begin` ... `end` - 1 of a row of a tier; the output is `acc` and, for all d, `shift`."""
    # bfloat16 has the exponents of float32: weight times scale stays a number, whatever the scale.
    narrow: tl.constexpr = q.dtype == tl.float16 and VALUE_BITS != 16
    into: tl.constexpr = tl.bfloat16 if narrow else q.dtype
    segment = tl.load(tier[0] + row).to(tl.int64)
    query_sum = tl.sum(q.to(tl.float32), 1)
    n = tl.arange(0, BLOCK_N)
    ahead = begin * BLOCK_N
    # Two bytes a vector are too narrow for a pipeline of copies: they are read one block ahead.
    k_step, k_low = _load_steps(tier[2], tier[3], segment + ahead, ahead + n < entries, KEY_BITS, BLOCK_N)
    v_step, v_low = _load_steps(tier[5], tier[6], segment + ahead, ahead + n < entries, VALUE_BITS, BLOCK_N)
    for block in range(begin, end):
        first = segment + block * BLOCK_N
        valid = block * BLOCK_N + n < entries
        k = _load_vectors(tier[1], first, valid, magic, DIM, KEY_BITS, KEY_WORD, BLOCK_N, BLOCK_D).to(q.dtype)
        v = _load_vectors(tier[4], first, valid, magic, DIM, VALUE_BITS, VALUE_WORD, BLOCK_N, BLOCK_D).to(into)
        ahead += BLOCK_N
        next_k = _load_steps(tier[2], tier[3], segment + ahead, ahead + n < entries, KEY_BITS, BLOCK_N)
        next_v = _load_steps(tier[5], tier[6], segment + ahead, ahead + n < entries, VALUE_BITS, BLOCK_N)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (k_step * scale)[None, :]
        scores += query_sum[:, None] * (k_low * scale)[None, :]
        scores = cap(scores, softcap)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        mass = mass * shrink + tl.sum(weight, 1)
        # A step that float32 cannot tell from 0 beside its zero: the weight must not vanish with it.
        least = tl.abs(v_low) * 2.0**-40
        v_step = tl.where(v_step < least, least, v_step)
        scaled = (weight * v_step[None, :]).to(into)
        # Of the same rounded weights: an error of a weight is then one of the entry's share.
        shift = shift * shrink + tl.sum(scaled.to(tl.float32) * (v_low / v_step)[None, :], 1)
        acc = tl.dot(scaled, v, acc * shrink[:, None], input_precision="ieee")
        top = higher
        k_step, k_low = next_k
        v_step, v_low = next_v
    return top, mass, acc, shift


@triton.jit
def _begin(sinks, query_head, valid, is_first, BLOCK_M: tl.constexpr):
    """Largest logit and mass before a program's part of a row: the sink is in the part that begins the row."""
    top, mass = first_logits(sinks, query_head, valid, BLOCK_M)
    if sinks is not None:
        top = tl.where(is_first, top, float("-inf"))
        mass = tl.where(is_first, mass, 0.0)
    return top, mass


@triton.jit(do_not_specialize=["tail", "listed"])
def _attend(
    query,
    turned,
    keys,
    values,
    offset,
    length,
    tail_keys,
    tail_values,
    tail_mask,
    tail_length,
    pages,
    order,
    valid_count,
    lengths,
    contents,
    output,
    lse,
    partial,
    partial_lse,
    scale,
    softcap,
    sinks,
    magic,
    rows,
    tail,
    listed,
    new,
    packed,
    query_stride,
    turned_stride,
    tail_stride,
    mask_stride,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    DIM: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LEVELS: tl.constexpr,
    BASES: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks, used = _blocks(length, tail_length, lengths, rows, tail, listed, ROWS, HAS_LENGTH, PAGE, TIERS, BLOCK_N)
    total = tl.sum(blocks)
    share = tl.cdiv(total, tl.num_programs(0))
    program = tl.program_id(0)
    current = program * share
    stop = tl.minimum(current + share, total)
    row = tl.sum((tl.cumsum(blocks) <= current).to(tl.int32))
    first = tl.sum(tl.where(tl.arange(0, ROWS) < row, blocks, 0))  # block at which the row begins

    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # query head and token, as the output has them
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    token = m % new
    inside = (m < packed)[:, None] & (d < DIM)[None, :]
    tile = n[:, None] * DIM + d[None, :]

    while current < stop:
        batch, head = row // HEADS, row % HEADS
        pool_row = row // SHARE  # row of the pool, which query heads with lists of their own share
        kept = tl.load(length + pool_row).to(tl.int32)
        kept_blocks = tl.cdiv(kept, BLOCK_N)
        count = kept_blocks + tl.cdiv(used, BLOCK_N)
        entries = kept + used
        if PAGE:
            count = tl.cdiv(listed * PAGE, BLOCK_N)
            if HAS_SLOTS:
                entries = kept + tl.load(valid_count + batch).to(tl.int32)
        segment = tl.load(offset + pool_row).to(tl.int64) * DIM
        recent = batch.to(tl.int64) * tail_stride[0] + (head // SHARE).to(tl.int64) * tail_stride[1]
        query_row = query + batch.to(tl.int64) * query_stride[0] + head * (packed // new) * query_stride[1]
        source = (m // new * query_stride[1] + token * query_stride[2])[:, None] + d[None, :]
        q = tl.load(query_row + source, inside, other=0)
        if UPCAST:
            q = q.to(tl.float32)
        plain = count
        for tier in tl.static_range(TIERS):
            count += tl.cdiv(tl.load(lengths[tier] + pool_row).to(tl.int32), BLOCK_N)

        top, mass = _begin(sinks, head * (packed // new) + m // new, m < packed, current == first, BLOCK_M)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for block in range(current - first, tl.minimum(stop - first, plain)):
            if PAGE:
                item = block * BLOCK_N + n
                page = tl.load(pages + row.to(tl.int64) * listed + item // PAGE, item < listed * PAGE, other=-1)
                slot = page.to(tl.int32) * PAGE + item % PAGE
                valid = (slot >= 0) & (slot < entries)
                in_tail = slot >= kept
                place = slot
                if HAS_SLOTS:
                    into = order + batch.to(tl.int64) * tail + slot - kept
                    place = tl.where(in_tail, tl.load(into, valid & in_tail, other=0).to(tl.int32) + kept, slot)
                shift = tl.where(in_tail, recent + (place - kept) * DIM, segment + place.to(tl.int64) * DIM)
                from_keys = (tl.where(in_tail, tail_keys, keys) + shift)[:, None]
                from_values = (tl.where(in_tail, tail_values, values) + shift)[:, None]
                within = d[None, :]
            else:
                # One loop for segment and tail: a pipeline of loads that does not run dry between them.
                in_tail = block >= kept_blocks
                begin = tl.where(in_tail, block - kept_blocks, block) * BLOCK_N
                slot = begin + n
                valid = slot < tl.where(in_tail, used, kept)
                shift = tl.where(in_tail, recent, segment) + begin * DIM
                from_keys = tl.where(in_tail, tail_keys, keys) + shift
                from_values = tl.where(in_tail, tail_values, values) + shift
                within = tile
            present = valid[:, None] & (d < DIM)[None, :]
            k = tl.load(from_keys + within, present, 0, eviction_policy="evict_first")
            v = tl.load(from_values + within, present, 0, eviction_policy="evict_first")
            if UPCAST:
                k, v = k.to(tl.float32), v.to(tl.float32)
            attended = valid[None, :]
            if PAGE == 0:
                attended = attended & (~in_tail | (slot[None, :] <= used - new + token[:, None]))
            if HAS_MASK:
                in_mask = in_tail & valid[None, :] & (m < packed)[:, None]
                mask_row = tail_mask + batch.to(tl.int64) * mask_stride[0]
                mask_row += (token * mask_stride[2])[:, None] + (slot * mask_stride[3])[None, :]
                attended = valid[None, :] & (~in_tail | tl.load(mask_row, in_mask, other=0))
            scores = cap(tl.dot(q, tl.trans(k), input_precision="ieee") * scale, softcap)
            scores = tl.where(attended, scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(top - base)
            mass = mass * shrink + tl.sum(weight, 1)
            acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = higher

        if TIERS > 0:
            turned_row = turned + batch.to(tl.int64) * turned_stride[0] + head * (packed // new) * turned_stride[1]
            source = (m // new * turned_stride[1] + token * turned_stride[2])[:, None] + d[None, :]
            q = tl.load(turned_row + source, inside, other=0)
            if UPCAST:
                q = q.to(tl.float32)
            tiers_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            tiers_mass, shift = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
            tiers_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            before = plain
            for tier in tl.static_range(TIERS):
                entries = tl.load(lengths[tier] + pool_row).to(tl.int32)
                own = tl.cdiv(entries, BLOCK_N)
                tiers_top, tiers_mass, tiers_acc, shift = _attend_tier(
                    q,
                    contents[tier],
                    pool_row,
                    entries,
                    tl.maximum(current - first - before, 0),
                    tl.minimum(stop - first - before, own),
                    scale,
                    softcap,
                    magic,
                    tiers_top,
                    tiers_mass,
                    tiers_acc,
                    shift,
                    LEVELS[4 * tier],
                    LEVELS[4 * tier + 1],
                    LEVELS[4 * tier + 2],
                    LEVELS[4 * tier + 3],
                    DIM,
                    BLOCK_N,
                    BLOCK_D,
                )
                before += own
            higher = tl.maximum(top, tiers_top)
            base = tl.where(higher == float("-inf"), 0.0, higher)
            shrink, tiers_shrink = tl.exp2(top - base), tl.exp2(tiers_top - base)
            mass = mass * shrink + tiers_mass * tiers_shrink
            acc = acc * shrink[:, None]
            tiers_acc = (tiers_acc + shift[:, None]) * tiers_shrink[:, None]
            top = higher
            if BASES == 1:
                acc += tiers_acc
            tiers_acc = tiers_acc / tl.where(mass == 0, 1.0, mass)[:, None]

        acc = acc / tl.where(mass == 0, 1.0, mass)[:, None]
        log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
        where = m[:, None] * (BASES * DIM) + d[None, :]
        if first // share == (first + count - 1) // share:
            target = row.to(tl.int64) * packed
            joined = output + target * (BASES * DIM) + where
            tl.store(joined, acc.to(output.dtype.element_ty), inside)
            if BASES == 2:
                tl.store(joined + DIM, tiers_acc.to(output.dtype.element_ty), inside)
            tl.store(lse + target + m, log_mass / 1.4426950408889634, m < packed)
        else:  # a row that began before this program is its first, any other its last
            target = (program * 2 + (first >= program * share).to(tl.int32)).to(tl.int64) * packed
            unjoined = partial + target * (BASES * DIM) + where
            tl.store(unjoined, acc, inside)
            if BASES == 2:
                tl.store(unjoined + DIM, tiers_acc, inside)
            tl.store(partial_lse + target + m, log_mass, m < packed)
        first += count
        current = first
        row += 1


@triton.jit(do_not_specialize=["programs", "tail", "listed"])
def _merge(
    length,
    tail_length,
    lengths,
    output,
    lse,
    partial,
    partial_lse,
    programs,
    rows,
    tail,
    listed,
    packed,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_LENGTH: tl.constexpr,
    PAGE: tl.constexpr,
    TIERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTS: tl.constexpr = 16,
):
    """Merge the partial results of one row and query, in the order of the row's blocks."""
    row, m = tl.program_id(0), tl.program_id(1)
    blocks, _ = _blocks(length, tail_length, lengths, rows, tail, listed, ROWS, HAS_LENGTH, PAGE, TIERS, BLOCK_N)
    share = tl.cdiv(tl.sum(blocks), programs)
    index = tl.arange(0, ROWS)
    first = tl.sum(tl.where(index < row, blocks, 0))
    head = first // share
    tail_end = (first + tl.sum(tl.where(index == row, blocks, 0)) - 1) // share
    if head == tail_end:
        return
    d = tl.arange(0, BLOCK_D)
    top = float("-inf")
    mass = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(head, tail_end + 1, PARTS):
        part = begin + tl.arange(0, PARTS)
        valid = part <= tail_end
        source = (part * 2 + (part == head).to(tl.int32)).to(tl.int64) * packed + m
        log_mass = tl.load(partial_lse + source, valid, other=float("-inf"))
        part_acc = tl.load(partial + source[:, None] * DIM + d[None, :], valid[:, None] & (d < DIM)[None, :], other=0)
        higher = tl.maximum(top, tl.max(log_mass))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp2(log_mass - base)
        shrink = tl.exp2(top - base)
        mass = mass * shrink + tl.sum(weight)
        acc = acc * shrink + tl.sum(weight[:, None] * part_acc, 0)
        top = higher
    acc = acc / tl.where(mass == 0, 1.0, mass)
    log_mass = tl.where(mass == 0, float("-inf"), top + tl.log2(tl.where(mass == 0, 1.0, mass)))
    target = row.to(tl.int64) * packed + m
    tl.store(output + target * DIM + d, acc.to(output.dtype.element_ty), d < DIM)
    tl.store(lse + target, log_mass / 1.4426950408889634)
