"""The attention layers of a model's text decoder, among all that its modules are."""

import inspect
from collections.abc import Container
from typing import Any

import torch
from torch import nn

from learnkv.cache.plain_layers import Layout

_OUTPUTS = ("o_proj", "out_proj")
"""Names of the output projection."""


def is_attention(module: nn.Module) -> bool:
    """Whether a module has the parts of an attention layer: some convolutions have them, too."""
    return hasattr(module, "layer_idx") and any(hasattr(module, name) for name in _OUTPUTS)


def uses_interface(module: nn.Module) -> bool:
    """Whether a layer looks up its attention function, as those do that can be given another."""
    forwards = (inspect.unwrap(vars(kind)["forward"]) for kind in type(module).__mro__ if "forward" in vars(kind))
    return any("ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names for forward in forwards)


def attention_modules(model: Any, indices: Container[int]) -> list[tuple[str, Any]]:
    """Names and modules of the text decoder's attention layers whose `layer_idx` is among `indices`, in their order.

    A mixer that lies beside the attention of the same layer is left out, as it does not attend.
    """
    text = model.config.get_text_config(decoder=True)
    candidates = [
        (name, module)
        for name, module in model.named_modules()
        if is_attention(module) and module.layer_idx in indices and getattr(module, "config", text) is text
    ]
    attending = {module.layer_idx for _, module in candidates if uses_interface(module)}
    return [(name, layer) for name, layer in candidates if layer.layer_idx not in attending or uses_interface(layer)]


def layer_devices(model: nn.Module, layout: Layout) -> list[torch.device]:
    """Device of every layer of the model."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        weight = next(module.parameters(), None) if hasattr(module, "layer_idx") else None
        if weight is not None:
            devices.setdefault(int(module.layer_idx), weight.device)  # type: ignore[arg-type]
    first = next(model.parameters()).device
    return [devices.get(index, first) for index in range(len(layout.layers))]
