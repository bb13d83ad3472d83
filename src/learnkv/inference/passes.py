"""Checks around every pass of an attached model: each layer has to read the compressed cache, by our attention."""

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.reader import Reader
from learnkv.errors import UserError
from learnkv.inference import moving_rope
from learnkv.inference.lora import follow_cache

NAME = "learnkv"
EMBEDDINGS = "_learnkv_embeddings"
"""Attribute of an attached model: rotary embeddings that depend on the number of tokens."""


def begin_pass(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of a model: prepare it for the cache that it is called with.

    Raises:
        UserError: where the model would not read the cache, or would rotate new tokens otherwise than those before.
    """
    follow_cache(model, args, kwargs)
    embeddings = getattr(model, EMBEDDINGS)
    for embedding in embeddings:
        vars(embedding).pop(moving_rope.ROTATION, None)
    cache = _compressed(kwargs)
    if cache is None:
        return
    if (cause := _bypass(model)) is not None:
        raise UserError(cause)
    cache.read_by = Reader(model)
    if cache.pending is not None:
        _take_pending(cache, args, kwargs)
    for layer in cache.compressed_layers():
        layer.attended = False
    bound = _known_bound(cache, kwargs)
    if embeddings:
        reached = functools.partial(_reached, cache, args, kwargs)
        moving_rope.set_rotation(model, embeddings, cache, bound or reached(), reached)


def end_pass(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of a model: every compressed layer has to have read the tokens of this pass.

    Raises:
        UserError: for a layer that has not.
    """
    for embedding in getattr(model, EMBEDDINGS):
        vars(embedding).pop(moving_rope.ROTATION, None)
    cache = _compressed(kwargs)
    if cache is None:
        return
    missing = [index for index in cache.compressible if not cache.layers[index].attended]
    if missing:
        raise UserError(
            f"{model.config.model_type}: {len(missing)} of {len(cache.compressible)} attention layers did not read the "
            f"compressed cache, first layer {missing[0]}: its output is not used"
        )


class CheckedInputs:
    """`prepare_inputs_for_generation` of an attached model, which may not leave a compressed cache unread."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(type(self.model).prepare_inputs_for_generation)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kind: Any = type(self.model)
        inputs = kind.prepare_inputs_for_generation(self.model, *args, **kwargs)
        cache = _compressed(kwargs)
        if cache is None:
            return inputs
        name = self.model.config.model_type
        if cache.images is not None and any(cache.images.shifts):
            raise UserError(
                f"{name}: generate() of transformers does not know the positions after the images of this cache: use "
                "learnkv.generate without beams"
            )
        if kwargs.get("is_first_iteration"):
            _check_beginning(cache, kwargs.get("input_ids", args[0] if args else None))
        if inputs.get("use_cache") is False:
            raise UserError(
                f"{name}: its generation config sets use_cache=False: a compressed cache needs use_cache=True"
            )
        if inputs.get("past_key_values") is not cache:
            raise UserError(
                f"{name}: generate() drops the cache after {cache.get_seq_length()} tokens, as its RoPE changes with "
                "the length"
            )
        return inputs


def _check_beginning(cache: CompressedCache, ids: Tensor | None) -> None:
    """Raise UserError where a text that should begin with the tokens that the cache has read does not (host sync).

    Texts of two parts are often tokenised otherwise than both parts by themselves. Shorter ids are a continuation.
    """
    if ids is None or cache.token_ids is None or ids.shape[1] <= cache.compressed_layers()[0].get_seq_length():
        return
    prompt = cache.token_ids[0].to(ids.device)
    if prompt.shape[0] != ids.shape[0]:
        return
    different = (ids[:, : prompt.shape[1]] != prompt) & cache.prompt_mask.to(ids.device)
    if bool(different.any()):
        raise UserError(
            f"input_ids differ from what the cache has read, first in slot {int(different.any(0).long().argmax())} of "
            f"{prompt.shape[1]}: append to the ids that were read, or use learnkv.generate with what follows them"
        )


def _compressed(kwargs: dict[str, Any]) -> CompressedCache | None:
    cache = kwargs.get("past_key_values")
    return cache if isinstance(cache, CompressedCache) else None


def _bypass(model: Any) -> str | None:
    """Why an attached model would not read a compressed cache; None where it will."""
    config = model.config.get_text_config(decoder=True)
    name, implementation = config.model_type, config._attn_implementation
    if implementation != NAME:
        return f"{name}: its attention was set to {implementation!r} after attach: call learnkv.detach and attach"
    if model.training and _recomputes(model):
        return (
            f"{name}: gradient checkpointing drops the cache while training: call model.eval() or "
            "gradient_checkpointing_disable()"
        )
    return None


def _take_pending(cache: CompressedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Expect a pass outside learnkv to begin with the tokens of the last turn that the model has not read."""
    assert cache.pending is not None
    unread, is_token = cache.pending
    given = kwargs.get("input_ids", args[0] if args else None)
    first = None if given is None else given[:, : unread.shape[1]].to(unread.device)
    if first is None or first.shape != unread.shape or bool(((first != unread) & is_token).any()):
        raise UserError(
            f"the cache has yet to read the last {unread.shape[1]} tokens of the last turn: let input_ids begin with "
            "them, or use learnkv.generate or learnkv.continuation, which read them first"
        )
    cache.pending = None


def _recomputes(model: Any) -> bool:
    """Whether transformers recomputes activations; the name of the property depends on its release."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    recomputes: bool = getattr(model, next(name for name in names if hasattr(type(model), name)))
    return recomputes


def _known_bound(cache: CompressedCache, kwargs: dict[str, Any]) -> int | None:
    """Tokens that no row exceeds after a pass that prefill or generation began; None for other positions."""
    positions, bound = cache.expected_pass or (None, None)
    cache.expected_pass = None
    return bound if positions is not None and positions is kwargs.get("position_ids") else None


def _reached(cache: CompressedCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Tokens of the longest row after a pass; a host sync where positions are given."""
    positions = kwargs.get("position_ids")
    if positions is not None:
        return int(positions.max().item()) + 1
    given = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args]
    tokens: int = next(part for part in given if part is not None).shape[1]
    length: int = cache.get_seq_length()
    return length + tokens
