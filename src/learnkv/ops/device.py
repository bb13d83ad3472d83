"""What kernels need to know of a device before they are launched."""

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 2 elsewhere, where an interpreter runs one program after the other."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
