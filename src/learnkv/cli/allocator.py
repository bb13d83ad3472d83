"""The C library's memory: freed blocks are kept for the next tensor."""

import ctypes
import platform

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Numbers of mallopt's parameters in glibc's malloc.h."""
LARGEST_BLOCK = 32 << 20
"""Bytes up to which a block comes from the heap: the most that glibc allows."""
MOST_KEPT = 512 << 20
"""Free bytes at the heap's end that are not given back."""


def keep_freed_memory() -> bool:
    """Let glibc keep up to half a gigabyte of freed memory; gives whether it does.

    By default activations are mapped anew and their pages cleared, about 7 % of the CPU time that SmolLM2 takes for two
    prompts of 640 tokens (`python -m benchmarks.freed_memory`). Nothing happens with another C library.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST_BLOCK) and mallopt(TRIM_THRESHOLD, MOST_KEPT))
