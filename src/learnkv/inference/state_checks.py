"""Whether a hybrid model's states can be carried from pass to pass, found by reading a few tokens."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnkv.cache.plain_layers import stateful_layers
from learnkv.errors import UserError
from learnkv.inference.layer_functions import evaluating
from learnkv.inference.models import embedded_tokens

_PARTS = (5, 3, 1)  # tokens of the passes that are compared with a single one
_PADDING = 3
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF = 0.1  # of the norm of the logits: rounding alone is below, a state that is lost is far above
PADDED = "_learnkv_padding"
"""Attribute of an attached hybrid model: why it cannot read padded prompts; empty: it can."""


@torch.no_grad()
def check_states(model: PreTrainedModel) -> None:
    """Raise UserError for a hybrid model whose states do not all lie in its cache, or are lost between passes.

    Whether padding before a prompt changes states is recorded for `refuse_padding`. Nothing is read on meta devices.
    """
    setattr(model, PADDED, "")
    layers = stateful_layers(model.config)
    if not layers or next(model.parameters()).is_meta:
        return
    name = model.config.get_text_config(decoder=True).model_type
    try:
        with evaluating(model):
            _check_parts(model, layers)
            _record_padding(model)
    except UserError as error:
        delattr(model, PADDED)
        raise UserError(f"{name}: {error}") from None


def refuse_padding(model: PreTrainedModel) -> None:
    """Raise UserError for a model whose states padding before a prompt changes."""
    if reason := getattr(model, PADDED, ""):
        name = model.config.get_text_config(decoder=True).model_type
        raise UserError(f"{name}: {reason}: read prompts of different lengths one by one")


def _check_parts(model: PreTrainedModel, layers: list[int]) -> None:
    cache: Any = DynamicCache(config=model.config)
    ids = _ids(model)
    try:
        whole = model(input_ids=ids, use_cache=False).logits.float()
        logits, begin = [], 0
        for part in ids.split(_PARTS, 1):
            positions = torch.arange(begin, begin := begin + part.shape[1], device=ids.device).unsqueeze(0)
            output = model(input_ids=part, position_ids=positions, past_key_values=cache, use_cache=True)
            logits.append(output.logits.float())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises for a cache that is not its own
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise UserError(f"it cannot be read with transformers' own cache ({reason})") from error
    empty = [index for index in layers if not any(cache.layers[index].has_previous_state.values())]
    if empty:
        raise UserError(f"the state of layer {empty[0]} does not lie in the cache: not supported")
    if _differ(model, torch.cat(logits, 1), whole):
        raise UserError("transformers reads a text in parts otherwise than at once, as its states are lost")


def _record_padding(model: PreTrainedModel) -> None:
    ids = _ids(model)
    padded = torch.cat([ids[:, :_PADDING], ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :_PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    alone = model(input_ids=ids, use_cache=False).logits.float()
    logits = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
    if _differ(model, logits[:, _PADDING:], alone):
        setattr(model, PADDED, "padding changes its states")


def _ids(model: PreTrainedModel) -> Tensor:
    """Ids [1, T] of tokens, which are few enough to be no markers of images."""
    tokens = min(embedded_tokens(model), 1000)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, tokens, (1, sum(_PARTS)), generator=generator).to(model.device)


def _differ(model: PreTrainedModel, logits: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE.get(model.dtype, _HALF)
    return not bool((logits - expected).norm() <= tolerance * expected.norm())
