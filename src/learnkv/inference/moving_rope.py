"""Rotary embeddings that depend on the number of tokens (longrope, dynamic): one rotation for all tokens of a cache."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError

ROTATION = "_learnkv_rotation"
"""Attribute of an embedding during a pass: the `Rotation` of the cache."""
_POSITIONS = 8  # that are compared
_FAR = 2**22  # tokens that no model reads
_UNCHANGED = "default"  # the type of RoPE that transformers does not adapt to the positions
_OTHER_KINDS = (IndexError, TypeError, ValueError)  # of a table, or of an embedding that is called otherwise


class Rotation:
    """The rotary embeddings of a model as they are for texts of `length` tokens; a decode step waits for nothing.

    Args:
        embeddings: those that depend on the number of tokens.
        length: tokens whose angles all keys of a cache are rotated by.
    """

    def __init__(self, embeddings: Sequence[Any], length: int) -> None:
        self.embeddings, self.length = embeddings, length
        self._fixed: dict[tuple[Any, torch.device], Any] = {}

    def agrees(self, length: int) -> bool:
        """Whether texts of `length` tokens are rotated alike, as far as both go."""
        return all(_same_angles(embedding, length, self.length) for embedding in self.embeddings)

    @functools.cached_property
    def limit(self) -> int:
        """The most tokens that are rotated alike; angles change at one length (longrope), or from one on (dynamic)."""
        alike, different = self.length, _FAR
        if self.agrees(different):
            return different
        while different - alike > 1:
            middle = (alike + different) // 2
            alike, different = (middle, different) if self.agrees(middle) else (alike, middle)
        return alike

    def angles(self, module: Any, x: Tensor, position_ids: Tensor, **layer_type: Any) -> Any:
        """What an embedding returns for positions [B, T] on the device of `x`."""
        key = (module, x.device)
        if key not in self._fixed:
            self._fixed[key] = _fixed(module, self.length, x.device)
        return _with_last(self._fixed[key], self.length, x, position_ids, **layer_type)


def moving_embeddings(model: nn.Module) -> list[nn.Module]:
    """The rotary embeddings of a model whose angles depend on the number of tokens."""
    return [
        module for module in model.modules() if _is_embedding(module) and not _same_angles(module, _POSITIONS, _FAR)
    ]


def set_rotation(
    model: PreTrainedModel, embeddings: list[Any], cache: CompressedCache, bound: int, reached: Callable[[], int]
) -> None:
    """Let a pass rotate by the angles that the keys of `cache` are rotated by.

    Args:
        bound: tokens of the longest row after the pass, or more where padding counts.
        reached: the true number, which may cost a host sync.

    Raises:
        UserError: where so many tokens need other angles than those that were read, or rows differ in that.
    """
    rotation = cache.rotation
    if isinstance(rotation, Rotation):
        longest = bound if bound <= rotation.limit else reached()
        others = {longest} if longest > rotation.limit else set()
    else:
        length = max(cache.prompt_lengths, default=0)
        rotation = cache.rotation = Rotation(embeddings, length if bound <= length else max(length, reached()))
        others = {length for length in cache.prompt_lengths if not rotation.agrees(length)}
    if others:
        raise UserError(
            f"{model.config.model_type}: the angles of its RoPE ({_rope_type(embeddings[0])}) change with the "
            f"length: those of {min(others)} tokens are not those of the {rotation.length} that the cache has "
            "read; read such texts whole, and apart from shorter ones"
        )
    for embedding in embeddings:
        vars(embedding)[ROTATION] = rotation


def rotate(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of a rotary embedding: the angles of the cache that is read, where they depend on the length."""
    rotation = vars(module).get(ROTATION)
    if rotation is None:
        return output
    given = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    return rotation.angles(module, **given)


def _is_embedding(module: Any) -> bool:
    buffers = any("inv_freq" in name for name, _ in module.named_buffers(recurse=False))
    return buffers and hasattr(module, "config")


def _same_angles(module: Any, length: int, other: int) -> bool:
    """Whether texts of both lengths are rotated alike, as far as both go.

    Two tokens at least are compared, as the first one has no angle.
    """
    last = max(min(length, other), 2) - 1
    positions = torch.linspace(0, last, min(_POSITIONS, last + 1), dtype=torch.float64).long().unsqueeze(0)
    x = torch.zeros(1, 1, 1, dtype=torch.float32)
    for layer_type in _layer_types(module):
        try:
            first, second = (
                _with_last(_new(module, x.device), total, x, positions, **layer_type) for total in (length, other)
            )
        except _OTHER_KINDS:
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


def _new(module: Any, device: torch.device) -> Any:
    """A new embedding of the same kind: embeddings remember what they were called with."""
    with torch.device("cpu"):
        return type(module)(module.config).to(device)


def _fixed(module: Any, length: int, device: torch.device) -> Any:
    """A new embedding with the angles of `length` tokens, which it keeps whatever positions it is called with."""
    new = _new(module, device)
    last = torch.full((1, 1), length - 1, device=device)
    try:
        for layer_type in _layer_types(module):
            new(torch.zeros(1, 1, 1, dtype=torch.float32, device=device), last, **layer_type)
    except _OTHER_KINDS:
        return new
    if isinstance(rope_type := getattr(new, "rope_type", None), dict):
        new.rope_type = dict.fromkeys(rope_type, _UNCHANGED)
    elif rope_type is not None:
        new.rope_type = _UNCHANGED
    return new


def _with_last(embedding: Any, length: int, x: Tensor, position_ids: Tensor, **layer_type: Any) -> Any:
    """What a new embedding returns for positions [..., T]; it takes the length from the largest position."""
    last = torch.full_like(position_ids[..., :1], length - 1)
    angles = embedding(x, torch.cat([position_ids, last], -1), **layer_type)
    return angles[..., :-1, :] if isinstance(angles, Tensor) else tuple(part[..., :-1, :] for part in angles)


def _rope_type(module: Any) -> str:
    rope_type = getattr(module, "rope_type", None)
    return ", ".join(sorted(set(rope_type.values()))) if isinstance(rope_type, dict) else str(rope_type)
