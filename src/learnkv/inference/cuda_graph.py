"""When a decode step can be captured as a CUDA graph, and the capture."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError
from learnkv.ops.dispatch import prefers_reference

Replay = Callable[[], None]
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MOVING_ROPE = {"dynamic", "longrope"}


def refusal(model: nn.Module, cache: CompressedCache, slots: int) -> str | None:
    """Why the decode step of `model` cannot be captured; None where it can.

    A CUDA graph repeats its launches at the same addresses. So all tensors have to lie on one CUDA device, and the host
    may decide nothing: no routing to experts, no RoPE that depends on the length, no sliding windows or states of a
    hybrid model, no references in place of kernels.

    Args:
        slots: tail slots that will be in use at the end.
    """
    devices = {parameter.device for parameter in model.parameters()}
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    if {device.type for device in devices} != {"cuda"}:
        return f"the model is on {', '.join(sorted({device.type for device in devices}))}"
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in model.modules()):
        return "the model is spread over several devices"
    if cache.is_hybrid:
        return f"{'sliding layers' if cache.sliding else 'states'} of a hybrid model"
    if cache.schedule is not None:
        return "the policy evicts while tokens are added"
    if window is not None and max(layer.prompt_slots for layer in cache.compressed_layers()) + slots > window:
        return f"the sliding window of {window} tokens may be exceeded"
    if any(layer.relaxed for layer in cache.compressed_layers()):
        return "the cache is gated, for training"
    if any(getattr(config, name, None) for name in _EXPERTS):
        return "a mixture of experts routes tokens on the host"
    if _MOVING_ROPE & set(_rope_types(getattr(config, "rope_parameters", None))):
        return "RoPE changes with the length"
    if any(layer.page_index is not None for layer in cache.compressed_layers()):
        return "pages are chosen as the tail grows"
    if prefers_reference():
        return "references compute in place of kernels"
    return None


def _rope_types(parameters: Any) -> list[str]:
    """All rope types of a config, whose parameters may be nested by layer type."""
    if not isinstance(parameters, dict):
        return []
    return [parameters.get("rope_type", "")] + [name for nested in parameters.values() for name in _rope_types(nested)]


def capture(step: Callable[[], None], device: torch.device, generator: torch.Generator | None) -> Replay:
    """Capture `step` without running it, and return the function that replays it.

    Raises:
        RunError: for an operation that a graph cannot repeat.
    """
    try:
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        with torch.cuda.device(device), torch.cuda.graph(graph):
            step()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise RunError(f"the decode step cannot be captured as a CUDA graph ({reason}): pass graph=False") from error
    return graph.replay
