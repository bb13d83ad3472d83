"""Prompts of vision-language models: images beside token ids, and the positions that they have."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.core.images import ImageTokens
from learnkv.errors import UserError

_EMBEDDINGS = "inputs_embeds"
_KINDS = ("mm_token_type_ids", "token_type_ids")  # what processors name which tokens are images
_MARKERS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
_OURS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "labels"}


@dataclass(frozen=True)
class PromptInputs:
    """What a model reads of prompts beside their ids."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """Arguments of the model's forward pass."""
    images: ImageTokens | None = None
    positions: Tensor | None = None
    """[3, B, S] time, height and width of every slot; None: slots are counted."""

    def chunk(self, ids: Tensor, chunk: slice) -> dict[str, Tensor]:
        """Arguments of a pass over the slots `chunk` of ids [B, S]."""
        if _EMBEDDINGS not in self.given:
            return {"input_ids": ids[:, chunk], **self.given}
        others = {name: value for name, value in self.given.items() if name != _EMBEDDINGS}
        return {_EMBEDDINGS: self.given[_EMBEDDINGS][:, chunk], **others}


def prompt_inputs(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor | None,
    given: Mapping[str, Any] | None,
    chunk_size: int | None = None,
) -> PromptInputs:
    """What beside ids [B, S] is read, from what a processor gave.

    Args:
        mask: [B, S] 1 for tokens, 0 for padding; None: no padding.
        given: arguments of the model's forward pass.
        chunk_size: tokens read at once; None: all.

    Raises:
        UserError: for an argument that the model does not have, for images whose positions are not known, and for
            chunks of images that the model embeds itself.
    """
    if not given:
        return PromptInputs()
    if not isinstance(given, Mapping):
        raise UserError(f"inputs= of type {type(given).__name__}: expected tensors by name, as processors give them")
    known = inspect.signature(type(model).forward).parameters
    if wrong := sorted(name for name in given if name in _OURS or name not in known):
        raise UserError(f"inputs: {wrong[0]} is no further argument of {type(model).__name__}")
    kept = {name: value for name, value in given.items() if value is not None}
    embeds = kept.get(_EMBEDDINGS)
    if embeds is not None and embeds.shape[:2] != ids.shape:
        raise UserError(f"inputs: inputs_embeds of shape {list(embeds.shape)} for ids of shape {list(ids.shape)}")
    is_image = _image_slots(model, ids, kept)
    positions, shifts = _positions(model, ids, mask, kept, is_image)
    if embeds is not None:  # an argument of positions alone
        kept = {name: value for name, value in kept.items() if not name.endswith("grid_thw")}
    if chunk_size is not None and kept.keys() - {_EMBEDDINGS}:
        raise UserError(f"chunk_size={chunk_size}: prompts with images are read whole")
    return PromptInputs(kept, ImageTokens(is_image, shifts, positions is not None), positions)


def _image_slots(model: PreTrainedModel, ids: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """[B, S] True for tokens of images and videos."""
    for name in _KINDS:
        if name in given:
            kinds: Tensor = given[name] > 0
            return kinds
    markers = [getattr(model.config, name, None) for name in _MARKERS]
    known = [marker for marker in markers if marker is not None]
    return torch.isin(ids, torch.tensor(known, dtype=ids.dtype, device=ids.device))


def _positions(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, given: Mapping[str, Tensor], is_image: Tensor
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Positions [3, B, S] as the model gives them to images, and how far those of later tokens are shifted."""
    nothing = (0,) * len(ids)
    owner: Any = next((module for module in model.modules() if hasattr(module, "get_rope_index")), None)
    if owner is None or not bool(is_image.any()):
        return None, nothing
    if not any(name.endswith("grid_thw") for name in given):
        raise UserError("inputs: image_grid_thw is missing, which the positions of images depend on")
    config = model.config
    kinds = torch.zeros_like(ids, dtype=torch.int) + is_image
    if (video := getattr(config, "video_token_id", None)) is not None:
        kinds = torch.where(ids == video, 2, kinds)
    known = inspect.signature(owner.get_rope_index).parameters
    arguments = {"mm_token_type_ids": kinds} | {name: value for name, value in given.items() if name in known}
    positions, shifts = owner.get_rope_index(
        input_ids=ids,
        attention_mask=None if mask is None else mask.long(),
        **{name: value for name, value in arguments.items() if name in known},
    )
    return positions, tuple(shifts.flatten().tolist())
