"""Quantises and packs in one pass, gathered and rotated on the way, and decodes: one scale and zero per vector.

Packed codes are read as words of 32 bits where a vector is a whole number of them, else as bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from learnkv.ops.quantize import Grid, Quantized, Rotation, empty

MAGIC = 0x4B000000
"""2^23 in float32, whose lowest bits count ones."""
_TILE = 4096  # numbers that a program turns at once
_SMALLEST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149}


def quantize(vectors: Tensor, bits: int, group: int, grid: Grid, scale_dtype: torch.dtype) -> Quantized:
    """`quantize` in Triton, of whole vectors on the grid `offset`."""
    flat = vectors.detach().reshape(-1, vectors.shape[-1])
    out = empty(len(flat), flat.shape[1], bits, scale_dtype, flat.device)
    _launch(flat, None, bits, "none", out)
    return Quantized(*(part.view(*vectors.shape[:-1], part.shape[-1]) for part in out if part is not None))


def quantize_entries(
    source: Tensor, index: Tensor, bits: int, first_row: int, rotation: Rotation, out: Quantized
) -> None:
    """`quantize_entries` in Triton."""
    rows, slots, dim = source.shape
    _launch(source.detach().reshape(rows * slots, dim), index, bits, rotation, out, first_row * slots)


def dequantize(quantized: Quantized, bits: int, dim: int, grid: Grid) -> Tensor:
    """`dequantize` in Triton."""
    codes, scale, zero = quantized
    assert zero is not None
    vectors = torch.empty(*codes.shape[:-1], dim, dtype=torch.float32, device=codes.device)
    count = scale.numel()
    if count == 0:
        return vectors
    words, word = packed_words(codes.contiguous())
    block_d = triton.next_power_of_2(max(dim, 16))
    block_n = max(_TILE // block_d, 1)
    _dequantize[(triton.cdiv(count, block_n),)](
        words,
        scale.contiguous(),
        zero.contiguous(),
        vectors,
        count,
        MAGIC,
        DIM=dim,
        WORDS=words.shape[-1],
        WORD=word,
        BITS=bits,
        BLOCK_N=block_n,
        BLOCK_D=block_d,
    )
    return vectors


def packed_words(codes: Tensor) -> tuple[Tensor, int]:
    """Codes [..., W] uint8 as words, and the bits of a word: 32 where they fit, else 8."""
    if codes.shape[-1] % 4 == 0 and codes.storage_offset() % 4 == 0:
        return codes.view(torch.int32), 32
    return codes, 8


def _launch(
    source: Tensor, index: Tensor | None, bits: int, rotation: Rotation, out: Quantized, first_index: int = 0
) -> None:
    count, dim = len(out.codes), source.shape[-1]
    assert out.zero is not None
    assert all(part.is_contiguous() for part in (*out, *(() if index is None else (index,))))
    if count == 0:
        return
    block_d = triton.next_power_of_2(max(dim, 16))
    block_n = max(_TILE // block_d, 16)
    _quantize[(triton.cdiv(count, block_n),)](
        source.contiguous(),
        index,
        *out,
        count,
        first_index,
        _SMALLEST[out.scale.dtype],
        dim**-0.5,
        DIM=dim,
        BYTES=out.codes.shape[-1],
        BITS=bits,
        HADAMARD=rotation == "hadamard",
        HAS_INDEX=index is not None,
        UPCAST=source.device.type == "cpu",
        BLOCK_N=block_n,
        BLOCK_D=block_d,
        BLOCK_K=min(block_d, 32),
    )


@triton.jit
def _words(source, valid, w, WORDS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Words `w` of every vector, [BLOCK_N, W] uint32; 0 beyond its WORDS words."""
    present = valid[:, None] & (w < WORDS)[None, :]
    place = source + tl.arange(0, BLOCK_N)[:, None] * WORDS + w[None, :]
    return tl.load(place, present, 0, eviction_policy="evict_first").to(tl.uint32)


@triton.jit
def _halves(words, WIDTH: tl.constexpr):
    """Words [N, W] as [N, 2 * W]: after every word what lies WIDTH bits higher in it, in the same thread."""
    return tl.reshape(tl.join(words, words >> WIDTH), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def _one(words, magic, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The code SHIFT bits up in every word, float32: as low bits of 2^23 it needs no shift and no conversion."""
    magnified = (words & ((2**BITS - 1) << SHIFT)) | magic
    return (magnified.to(tl.float32, bitcast=True) - magic.to(tl.float32, bitcast=True)) * 2.0**-SHIFT


@triton.jit
def _two(words, magic, SHIFT: tl.constexpr, APART: tl.constexpr, BITS: tl.constexpr):
    return tl.join(_one(words, magic, SHIFT, BITS), _one(words, magic, SHIFT + APART, BITS))


@triton.jit
def _four(words, magic, SHIFT: tl.constexpr, APART: tl.constexpr, BITS: tl.constexpr):
    return tl.join(_two(words, magic, SHIFT, 2 * APART, BITS), _two(words, magic, SHIFT + APART, 2 * APART, BITS))


@triton.jit
def load_codes(
    source,
    valid,
    magic,
    WORDS: tl.constexpr,
    BITS: tl.constexpr,
    WORD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes [BLOCK_N, BLOCK_D] as float32 of vectors that follow each other; 0 for channels and vectors beyond.

    `magic` is `MAGIC`, handed over so that the compiler keeps it in a register.
    """
    magic = magic.to(tl.uint32)
    if BITS == 3:  # three words are WORD codes, in units of 24 bits
        w = 3 * tl.arange(0, BLOCK_D // WORD)
        first = _words(source, valid, w, WORDS, BLOCK_N)
        second = _words(source, valid, w + 1, WORDS, BLOCK_N)
        third = _words(source, valid, w + 2, WORDS, BLOCK_N)
        if WORD == 32:
            even = tl.join(first, (second >> 16) | (third << 16))
            odd = tl.join((first >> 24) | (second << 8), third >> 8)
            units = tl.reshape(tl.join(even, odd), [BLOCK_N, BLOCK_D // 8])
        else:
            units = first | (second << 8) | (third << 16)
        codes = _four(_halves(units, 12), magic, 0, 3, 3)
    else:
        units = _words(source, valid, tl.arange(0, BLOCK_D * BITS // WORD), WORDS, BLOCK_N)
        if WORD == 32:
            units = _halves(units, 16)
        together: tl.constexpr = min(WORD, 16) // BITS
        if together == 8:
            codes = tl.join(_four(units, magic, 0, 2 * BITS, BITS), _four(units, magic, BITS, 2 * BITS, BITS))
        elif together == 4:
            codes = _four(units, magic, 0, BITS, BITS)
        elif together == 2:
            codes = _two(units, magic, 0, BITS, BITS)
        else:
            codes = _one(units, magic, 0, BITS)
    return tl.reshape(codes, [BLOCK_N, BLOCK_D])


@triton.jit(do_not_specialize=["count"])
def _dequantize(
    words,
    scale,
    zero,
    vectors,
    count,
    magic,
    DIM: tl.constexpr,
    WORDS: tl.constexpr,
    WORD: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    valid = first + n < count
    codes = load_codes(words + first * WORDS, valid, magic, WORDS, BITS, WORD, BLOCK_N, BLOCK_D)
    step = tl.load(scale + first + n, valid, other=0).to(tl.float32)
    low = tl.load(zero + first + n, valid, other=0).to(tl.float32)
    decoded = codes * step[:, None] + low[:, None]
    target = vectors + first * DIM + n[:, None] * DIM + d[None, :]
    tl.store(target, decoded, valid[:, None] & (d < DIM)[None, :])


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """float32 numbers rounded to what another dtype holds, and the same in that dtype.

    By its bits for bfloat16: the interpreter cuts off, and makes the smallest numbers 0.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return (bits << 16).to(tl.float32, bitcast=True), bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    stored = x.to(dtype)
    return stored.to(tl.float32), stored


@triton.jit(do_not_specialize=["count", "first_index"])
def _quantize(
    source,
    index,
    codes,
    scale,
    zero,
    count,
    first_index,
    smallest,
    unit,
    DIM: tl.constexpr,
    BYTES: tl.constexpr,
    BITS: tl.constexpr,
    HADAMARD: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n, d = first + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    valid, inside = n < count, (d < DIM)[None, :]
    entry = n
    if HAS_INDEX:
        entry = tl.load(index + n, valid, other=first_index) - first_index
    vectors = source + entry[:, None] * DIM
    if HADAMARD:
        x = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for begin in range(0, DIM, BLOCK_K):
            k = begin + tl.arange(0, BLOCK_K)
            part = tl.load(vectors + k[None, :], valid[:, None] & (k < DIM)[None, :], other=0)
            if UPCAST:
                part = part.to(tl.float32)
            # Sylvester's signs: -1 where k & d has an odd number of bits; exact in every dtype.
            parity = k[:, None] & d[None, :]
            parity ^= parity >> 8
            parity ^= parity >> 4
            parity ^= parity >> 2
            parity ^= parity >> 1
            # Three products of float32 as tf32: the signs are exact, a number is so to 2^-22.
            x = tl.dot(part, (1 - 2 * (parity & 1)).to(part.dtype), x, input_precision="tf32x3")
        x = x * unit
    else:
        x = tl.load(vectors + d[None, :], valid[:, None] & inside, other=0)
    x = x.to(tl.float32)

    missing = tl.max(tl.where(inside & (x != x), 1, 0), 1) > 0
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    high = tl.max(tl.where(inside, x, float("-inf")), 1)
    low = tl.where(missing, float("nan"), low)
    levels: tl.constexpr = 2**BITS - 1
    width = tl.div_rn(high - low, tl.full([BLOCK_N], levels, tl.float32))
    width = tl.where(width < smallest, smallest, width)
    step, _ = _rounded(width, scale.dtype.element_ty)
    bottom, stored_zero = _rounded(low, zero.dtype.element_ty)
    place = tl.div_rn(x - bottom[:, None], tl.broadcast_to(step[:, None], [BLOCK_N, BLOCK_D]))
    # Half to even: float32 of this size have no fraction. What is not a number gets code 0.
    place = tl.where(place > levels, levels, tl.where(place > 0, place, 0.0))
    code = ((place + 12582912.0) - 12582912.0).to(tl.uint32)
    code = tl.where(inside, code, 0)

    infinite = float("inf")
    ok = (tl.abs(step) < infinite) & (tl.abs(bottom) < infinite) & (tl.abs(high) < infinite) & (tl.abs(low) < infinite)
    _, stored_scale = _rounded(tl.where(ok, step, float("nan")), scale.dtype.element_ty)
    tl.store(scale + n, stored_scale, valid)
    tl.store(zero + n, stored_zero, valid)
    # 3 bits: eight codes are three bytes; else a byte is a whole number of codes.
    together: tl.constexpr = 8 if BITS == 3 else 8 // BITS
    shift = (BITS * tl.arange(0, together)).to(tl.uint32)
    packed = tl.sum(tl.reshape(code, [BLOCK_N, BLOCK_D // together, together]) << shift[None, None, :], 2)
    b = tl.arange(0, BLOCK_D // together)
    size: tl.constexpr = 3 if BITS == 3 else 1
    for k in tl.static_range(size):
        byte = size * b + k
        target = codes + n[:, None] * BYTES + byte[None, :]
        tl.store(target, (packed >> (8 * k)).to(tl.uint8), valid[:, None] & (byte < BYTES)[None, :])
