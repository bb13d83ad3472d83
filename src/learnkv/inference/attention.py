"""The attention function of attached models: full attention while a prompt is read, then attention to kept entries."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.plain_layers import layout
from learnkv.errors import UserError
from learnkv.inference import moving_rope, padded_prompts
from learnkv.inference.attention_modules import attention_modules, uses_interface
from learnkv.inference.layer_arguments import embeddings_of, named_arguments
from learnkv.inference.layer_functions import CONVENTION, PLAIN, Attend, ProbedLayer
from learnkv.inference.layer_softmax import eager_attention, has_terms, softmax_terms
from learnkv.inference.passes import EMBEDDINGS, NAME, CheckedInputs, begin_pass, end_pass
from learnkv.inference.state_checks import PADDED, check_states
from learnkv.ops.prompt_attention import prompt_attention
from learnkv.ops.softmax_terms import NO_TERMS, SoftmaxTerms

_PREPARE = "prepare_inputs_for_generation"
_STATE = "_learnkv_detach"


def compressed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache_layer: CompressedLayer | None = None,
    plain_layer: bool = False,
    evict_if_due: Callable[[], None] | None = None,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention interface of transformers; returns [B, T, H*G, D] and no weights.

    Without a `cache_layer`, or while it reads the prompt, this is transformers' sdpa. Layers with a soft cap or sinks
    run their own eager attention with other caches, and block by block with a compressed one, in its `plain_layer`s
    too. `evict_if_due` is called after the last layer of a cache with online eviction. `attend`, if given, makes the
    result instead.

    Raises:
        UserError: for a bias of positions, an exceeded sliding window and dropout.
    """
    if attend is not None:
        return attend(query, key), None
    terms, compressed = softmax_terms(module, softcap, s_aux), plain_layer or cache_layer is not None
    if cache_layer is not None:
        if dropout:
            raise UserError(f"{type(module).__name__} drops out {dropout:g} of its attention: call model.eval()")
        cache_layer.confirm(type(module).__name__, key, value)
    if compressed:
        _check_mask(module, query, key, attention_mask, kwargs.get("position_bias"))
    if cache_layer is not None:
        _refuse_exceeded_window(module, cache_layer, kwargs.get("sliding_window"))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if cache_layer is None or not cache_layer.sealed:
        inputs = (query, key, value, attention_mask)
        if terms is not NO_TERMS and compressed and not dropout:
            prompt = prompt_attention(*inputs, scale, terms).transpose(1, 2).contiguous()
        elif terms is not NO_TERMS or (has_terms(module) and not compressed):
            prompt = eager_attention(module, *inputs, scaling=scale, dropout=dropout, softcap=softcap, **kwargs)
        elif compressed:
            prompt = padded_prompts.prompt_attention(module, *inputs, dropout=dropout, scaling=scaling, **kwargs)
        else:
            prompt, _ = sdpa_attention_forward(module, *inputs, dropout=dropout, scaling=scaling, **kwargs)
        if cache_layer is not None:
            cache_layer.capture.scaling, cache_layer.capture.terms = scale, terms.copied()
            cache_layer.observe(query, attention_mask)
        return prompt, None
    _check_frozen(module, cache_layer, terms)
    output = cache_layer.attend(query, attention_mask, scale, terms).transpose(1, 2).contiguous()
    if evict_if_due is not None:
        evict_if_due()
    return output, None


def _check_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, bias: Tensor | None) -> None:
    name = type(module).__name__
    if bias is not None:
        raise UserError(f"{name} uses position_bias, which learnkv's attention does not support")
    if mask is not None and mask.dtype != torch.bool:
        raise UserError(f"{name}: attention mask of type {mask.dtype}: expected the boolean mask of sdpa")
    if mask is None and 1 < query.shape[2] < key.shape[2]:  # sdpa would align their first ones
        raise UserError(f"{name} has no mask for tokens after others: read its prompts whole")


def _check_frozen(module: nn.Module, layer: CompressedLayer, terms: SoftmaxTerms) -> None:
    if layer.relaxed and terms.sinks is not None and terms.sinks.requires_grad and torch.is_grad_enabled():
        raise UserError(
            f"{type(module).__name__}: its attention sinks require gradients, which training policies does not "
            "compute: freeze the model"
        )


def _refuse_exceeded_window(module: Any, layer: CompressedLayer, window: int | None) -> None:
    kinds = getattr(module.config, "layer_types", None)
    if kinds and kinds[module.layer_idx] == "chunked_attention":
        window = module.config.attention_chunk_size
    if window is not None and layer.get_seq_length() > window:
        raise UserError(
            f"{type(module).__name__} attends to a sliding window of {window} tokens, {layer.get_seq_length()} were "
            "read: shorten the prompt or load the model with sliding_window=None"
        )


def _pass_cache_layer(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook without state: pass the cache's layer to the attention function, and inputs to its capture."""
    cache = kwargs.get("past_key_values")
    if not isinstance(cache, CompressedCache):
        return None
    if module.layer_idx >= len(cache.layers):
        raise UserError(f"{type(module).__name__} {module.layer_idx} attends to keys of another layer: not supported")
    if module.layer_idx not in cache.compressible:
        return (args, {**kwargs, "plain_layer": True}) if has_terms(module) else None
    layer = cache.layers[module.layer_idx]
    layer.expects_attention = True
    if not layer.sealed:
        _capture_functions(layer, module, args, kwargs)
    if (layer.decode_capture is not None or not layer.sealed) and layer.capture.capture_spec.reads_hidden:
        layer.capture.record(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], layer.sealed)
    kwargs = {**kwargs, "cache_layer": layer}
    schedule = cache.schedule
    if schedule is not None and not schedule.deferred and module.layer_idx == cache.compressible[-1]:
        kwargs["evict_if_due"] = cache.evict_if_due
    return args, kwargs


def _capture_functions(layer: CompressedLayer, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Let scorers apply the layer to other inputs."""
    capture, given = layer.capture, named_arguments(module, args, kwargs)
    if capture.functions is None:
        capture.functions = ProbedLayer(module, given)
        capture.functions.prepare(capture.capture_spec.functions)
    if (embeddings := embeddings_of(given)) is not None:
        capture.embeddings += (embeddings,)


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Switch `model` to learnkv's attention; with ordinary caches its outputs do not change.

    Raises:
        UserError: for compiled models and for models whose layers do not follow transformers' attention interface; each
            is named.
    """
    if hasattr(model, _STATE):
        return model
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"attach: expected a transformers model, got {type(model).__name__} (compile it after attach)")
    config = model.config.get_text_config(decoder=True)
    _, compressible, sliding = layout(model.config)  # raises for layers that the cache has no place for
    attending = {*compressible, *sliding}
    layers = [module for _, module in attention_modules(model, attending)]
    if len(layers) != len(attending) or not layers:
        raise UserError(
            f"{config.model_type}: found {len(layers)} attention layers of {len(attending) or 'some'}; learnkv "
            "supports decoder-only models with attention layers of transformers"
        )
    own = next((module for module in layers if not uses_interface(module)), None)
    if own is not None:
        raise UserError(f"{config.model_type}: {type(own).__name__} does not use transformers' attention interface")
    check_states(model)
    before = config._attn_implementation
    kind = "eager" if any(has_terms(module) for module in layers) else "sdpa"
    if before not in (kind, NAME):
        warnings.warn(
            f"attention implementation {before!r} is replaced by {kind} while learnkv is attached", stacklevel=2
        )
    AttentionInterface.register(NAME, compressed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(_of_text(model, NAME))
    handles = [module.register_forward_pre_hook(_pass_cache_layer, with_kwargs=True) for module in layers]
    embeddings = moving_rope.moving_embeddings(model)
    handles += [module.register_forward_hook(moving_rope.rotate, with_kwargs=True) for module in embeddings]
    handles.append(model.register_forward_pre_hook(begin_pass, with_kwargs=True))
    handles.append(model.register_forward_hook(end_pass, with_kwargs=True))
    setattr(model, EMBEDDINGS, embeddings)
    if hasattr(model, _PREPARE):
        setattr(model, _PREPARE, CheckedInputs(model))
    setattr(model, _STATE, (before, handles))
    return model


def _of_text(model: PreTrainedModel, implementation: str) -> Any:
    """As `set_attn_implementation` takes it for the text decoder alone: a vision tower has no cache."""
    config = model.config
    text = config.get_text_config(decoder=True)
    names = [name for name in config.sub_configs if getattr(config, name, None) is text]
    return {names[0]: implementation} if names else implementation


def detach(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `attach`."""
    if hasattr(model, _STATE):
        before, handles = getattr(model, _STATE)
        for handle in handles:
            handle.remove()
        for module in model.modules():
            for name in (CONVENTION, PLAIN, moving_rope.ROTATION):
                vars(module).pop(name, None)
        model.set_attn_implementation(_of_text(model, before))
        for name in (_STATE, EMBEDDINGS, PADDED, *({_PREPARE} & vars(model).keys())):
            delattr(model, name)
    return model


def implementation(model: PreTrainedModel) -> str:
    """The attention implementation that the model was loaded with, attached or not."""
    before: str = getattr(model, _STATE, (model.config.get_text_config(decoder=True)._attn_implementation,))[0]
    return before


def is_attached(model: nn.Module) -> bool:
    """Whether `attach` was called."""
    return hasattr(model, _STATE)
