"""Properties of a device that launches depend on, and copies of numbers to it."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def upload(numbers: Sequence[float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on `device` of numbers of the host, without the host sync of `torch.tensor(numbers, device=device)`.

    Floats are float32 where `dtype` is None, whatever torch's default is.
    """
    if dtype is None and any(isinstance(number, float) for number in numbers):
        dtype = torch.float32
    return torch.tensor(numbers, dtype=dtype).to(device, non_blocking=True)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 elsewhere, for the interpreter."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
