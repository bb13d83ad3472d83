"""Freed memory that the C library keeps."""

import platform
import subprocess
import sys

import pytest

from learnkv.cli import allocator

CHILD = """
import ctypes, resource, runpy
keep_freed_memory = runpy.run_path({file!r})["keep_freed_memory"]  # without torch
{call}
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def touch():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(20 << 20) for _ in range(6)]
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
touch()
print(sum(touch() for _ in range(4)))
"""


def page_faults(call: str) -> int:
    """Of a child that touches and frees the same six blocks of 20 MB four more times."""
    code = CHILD.format(call=call, file=allocator.__file__)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(found.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_blocks_are_used_again_without_new_pages() -> None:
    assert page_faults("assert keep_freed_memory()") < 100
    assert page_faults("") > 1000  # what the C library does by itself


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: 1 / 0)
    assert not allocator.keep_freed_memory()
