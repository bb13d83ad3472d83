"""Hashes of numbers."""

from torch import Tensor

WORD = 0xFFFFFFFF  # 32-bit words are stored as int64, which torch supports on every device


def hash_bits(word: Tensor) -> Tensor:
    """A bijection of 32-bit words after which every bit depends on every other (Wellons' lowbias32)."""
    word = (word + 0x9E3779B9) & WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & WORD
    return word ^ (word >> 16)
