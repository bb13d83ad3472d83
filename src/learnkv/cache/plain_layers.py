"""The layers of transformers' own cache that a compressed cache can take the place of."""

from collections.abc import Iterable
from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from learnkv.errors import UserError


def refuse_others(config: Any, layers: Iterable[object]) -> None:
    """Raise UserError for a model with `layers` that are more than keys and values of their own tokens."""
    if getattr(config, "num_kv_shared_layers", 0):
        raise UserError(f"{config.model_type}: layers that share keys and values with others are not supported")
    others = {type(layer).__name__ for layer in layers} - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if others:
        raise UserError(
            f"{config.model_type}: layers with a state beside keys and values are not supported ({', '.join(others)})"
        )
