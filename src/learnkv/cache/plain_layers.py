"""Which layers of a model a policy compresses, and what the others keep: windows of their own, states, or nothing."""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache

from learnkv.cache.layer import NOTHING, CompressedLayer
from learnkv.cache.state_layer import AttentionStateLayer, StateLayer
from learnkv.core.observation import CaptureSpec
from learnkv.errors import UserError

# By name: the oldest release has no DummyLayer.
_ATTENDING = ("DynamicLayer", "DynamicSlidingWindowLayer", "LinearAttentionAndFullAttentionLayer")
_STATES = "LinearAttentionLayer"
_KNOWN = {*_ATTENDING, _STATES, "DummyLayer"}
_NOTHING_KEPT = ("mlp", "moe")
"""Types of layers that keep nothing of what they read."""


class Layout(NamedTuple):
    """The layers of a model, by what their part of a cache is."""

    layers: list[Any]
    """One per layer of the model."""
    compressible: list[int]
    """Indices of those that a policy compresses."""
    sliding: list[int]
    """Indices of those that attend to a window, in a model that has others."""


def layout(config: PretrainedConfig, capture_spec: CaptureSpec = NOTHING) -> Layout:
    """The layers of an empty cache for a model.

    Layers that attend to a sliding window are compressed where all do, as their window has to hold all tokens then.

    Raises:
        UserError: for layers that keep anything else than keys and values, or states of linear attention.
    """
    layers: list[Any] = DynamicCache(config=config).layers
    text: Any = config.get_text_config(decoder=True)
    _refuse_others(text, layers)
    hybrid = len(set(layer_types(text))) > 1
    attending = [index for index, layer in enumerate(layers) if type(layer).__name__ in _ATTENDING]
    compressible = [index for index in attending if not (hybrid and getattr(layers[index], "is_sliding", False))]
    if attending and not compressible:
        raise UserError(f"{text.model_type}: every attention layer has a sliding window: there is nothing to compress")
    for layer_idx, index in enumerate(compressible):
        states = getattr(layers[index], "number_of_states", 0)
        if states:
            layers[index] = AttentionStateLayer(states, layer_idx, capture_spec)
        else:
            layers[index] = CompressedLayer(layer_idx, capture_spec)
    for index, layer in enumerate(layers):
        if type(layer).__name__ == _STATES:
            layers[index] = StateLayer(layer.number_of_states)
    return Layout(layers, compressible, [index for index in attending if index not in compressible])


def layer_types(text: Any) -> tuple[str, ...]:
    """The kind of every layer of a text decoder's config; none where all are alike."""
    return tuple(getattr(text, "layer_types", None) or ())


def stateful_layers(config: PretrainedConfig) -> list[int]:
    """Indices of the layers that keep states."""
    kinds = layer_types(config.get_text_config(decoder=True))
    layers = layout(config).layers
    return [i for i, layer in enumerate(layers) if isinstance(layer, StateLayer) and kinds[i] not in _NOTHING_KEPT]


def _refuse_others(config: Any, layers: Sequence[object]) -> None:
    """Raise UserError for a model with `layers` that are more than keys and values, or states, of their own tokens."""
    if getattr(config, "num_kv_shared_layers", 0):
        raise UserError(f"{config.model_type}: layers that share keys and values with others are not supported")
    others = sorted({type(layer).__name__ for layer in layers} - _KNOWN)
    if others:
        raise UserError(f"{config.model_type}: layers of this kind are not supported ({', '.join(others)})")


def fork_of(layer: Any) -> Any:
    """A copy of one layer of a cache that does not change with it."""
    return layer.fork() if hasattr(layer, "fork") else copy.copy(layer)
