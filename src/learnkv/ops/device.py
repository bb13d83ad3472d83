"""What kernels need to know of a device before they are launched, and how numbers get there."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def upload(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on `device` of numbers that the host knows.

    `torch.tensor(numbers, device=device)` would have the host wait until everything before it has been computed.
    """
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 elsewhere, where an interpreter runs one program after the other."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
