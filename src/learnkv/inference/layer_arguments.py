"""The arguments of an attention layer's forward pass."""

import inspect
from typing import Any

from torch import Tensor

from learnkv.core.observation import Embeddings


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer's forward pass by name."""
    if not args:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def embeddings_of(given: dict[str, Any]) -> Embeddings | None:
    """The rotary embeddings among a layer's arguments."""
    embeddings: Any = given.get("position_embeddings")
    return (embeddings,) if isinstance(embeddings, Tensor) else embeddings
