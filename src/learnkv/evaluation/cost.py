"""Seconds and peak memory of a part of an evaluation."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

_PROCESS = Path("/proc/self")


@dataclass
class Cost:
    """What a block of code took; filled in at its end."""

    seconds: float = 0.0
    peak_bytes: int | None = None
    """Most memory in use: of the device's allocator, or resident in the process on a CPU; None where it is unknown."""


@contextmanager
def measured(device: torch.device) -> Iterator[Cost]:
    """The cost of the block, work that it left on the device included."""
    cost = Cost()
    counts = _reset_peak(device)
    begin = now(device)
    yield cost
    cost.seconds = now(device) - begin
    cost.peak_bytes = _peak(device) if counts else None


def now(device: torch.device) -> float:
    """Seconds on a clock, when the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _reset_peak(device: torch.device) -> bool:
    """Let the peak begin at the present size; whether that is possible."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROCESS / "clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    except OSError:
        return False
    return device.type == "cpu"


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = (_PROCESS / "status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s*(\d+) kB", status)
    return None if peak is None else 1024 * int(peak[1])


def cost_per_prompt(prompts: int, seconds: float, decode: Cost | None, parts: Sequence[Cost]) -> dict[str, Any]:
    """Seconds of a prompt's share of its batch, and the peak of the whole batch; `decode` of None was not timed."""
    peaks = [part.peak_bytes for part in parts if part.peak_bytes is not None]
    return {
        "prefill_seconds": round(seconds / prompts, 6),
        "decode_seconds": None if decode is None else round(decode.seconds / prompts, 6),
        "peak_bytes": max(peaks, default=None),
    }
