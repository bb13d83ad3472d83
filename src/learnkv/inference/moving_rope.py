"""Rotary embeddings that depend on the number of tokens (longrope, dynamic): one rotation for all tokens of a cache."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError

LENGTH = "_learnkv_length"
"""Attribute of an embedding during a pass: number of tokens that its angles are those of."""
_POSITIONS = 8  # that are compared
_FAR = 2**22  # tokens that no model reads


def moving_embeddings(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model whose angles depend on the number of tokens."""
    return [
        module for module in model.modules() if _is_embedding(module) and not _same_angles(module, _POSITIONS, _FAR)
    ]


def set_length(model: PreTrainedModel, embeddings: list[Any], cache: CompressedCache, reached: int) -> None:
    """Let a pass that brings `cache` to `reached` tokens rotate by the angles that its keys are rotated by.

    Raises:
        UserError: where so many tokens need other angles than those that were read, or rows differ in that.
    """
    if not cache.rotation_length:
        cache.rotation_length = max(reached, *cache.prompt_lengths, 0)
        others = set(cache.prompt_lengths)
    else:
        others = {reached} if reached > cache.rotation_length else set()
    for length in others:
        if not all(_same_angles(embedding, length, cache.rotation_length) for embedding in embeddings):
            raise UserError(
                f"{model.config.model_type}: the angles of its RoPE ({_rope_type(embeddings[0])}) change with the "
                f"length: those of {length} tokens are not those of the {cache.rotation_length} that the cache has "
                "read; read such texts whole, and apart from shorter ones"
            )
    for embedding in embeddings:
        setattr(embedding, LENGTH, cache.rotation_length)


def at_length(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a rotary embedding: angles of the number of tokens that `set_length` gave, where it did."""
    length = vars(module).get(LENGTH)
    if length is None:
        return output
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    return _angles(module, length, **given)


def _is_embedding(module: Any) -> bool:
    buffers = any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    return buffers and hasattr(module, "config")


def _same_angles(module: Any, length: int, other: int) -> bool:
    """Whether texts of both lengths are rotated alike, as far as both go."""
    last = min(length, other) - 1
    positions = torch.linspace(0, last, min(_POSITIONS, last + 1), dtype=torch.float64).long().unsqueeze(0)
    for layer_type in _layer_types(module):
        try:
            first, second = (
                _angles(module, total, torch.zeros(1, 1, 1, dtype=torch.float32), positions, **layer_type)
                for total in (length, other)
            )
        except (IndexError, TypeError, ValueError):  # a table, or an embedding of another kind
            continue
        first, second = ((angles,) if isinstance(angles, Tensor) else angles for angles in (first, second))
        if not all(torch.equal(*pair) for pair in zip(first, second, strict=True)):
            return False
    return True


def _layer_types(module: Any) -> Iterator[dict[str, str]]:
    rope_type = getattr(module, "rope_type", None)
    if isinstance(rope_type, dict):
        yield from ({"layer_type": name} for name in rope_type)
    else:
        yield {}


def _angles(module: Any, length: int, x: Tensor, position_ids: Tensor, **layer_type: Any) -> Any:
    """What a new embedding returns for positions [..., T] of a text of `length` tokens.

    Embeddings remember what they were called with, hence a new one; it takes the length from the largest position.
    """
    with torch.device("cpu"):
        new = type(module)(module.config).to(x.device)
    last = torch.full_like(position_ids[..., :1], length - 1)
    angles = new(x, torch.cat([position_ids, last], -1), **layer_type)
    return angles[..., :-1, :] if isinstance(angles, Tensor) else tuple(part[..., :-1, :] for part in angles)


def _rope_type(module: Any) -> str:
    rope_type = getattr(module, "rope_type", None)
    return ", ".join(sorted(set(rope_type.values()))) if isinstance(rope_type, dict) else str(rope_type)
