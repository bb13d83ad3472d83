"""Activation checkpointing of students: decoder layers and the scorer are recomputed in the backward pass."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.plain_layers import fork_of
from learnkv.core.scorer import Scorer
from learnkv.inference.attention_modules import is_attention
from learnkv.inference.lora import follow_cache

Method = Callable[..., Any]


@contextmanager
def recomputed(model: nn.Module, scorer: Scorer | None = None) -> Iterator[None]:
    """Activation checkpointing within the block, for decoder layers on continuations with gradients and for the scorer.

    A layer appends to its cache, which must happen once: the recomputation uses a copy of the cache from before.
    Prompts, which are read without gradients, are not affected.
    """
    methods = {(layer, "forward"): _of_layer(model, layer) for layer in decoder_layers(model)}
    if scorer is not None:
        methods[scorer, "score"] = _of_scorer(scorer.score)
    before = {(owner, name): vars(owner).get(name) for owner, name in methods}
    for (owner, name), method in methods.items():
        setattr(owner, name, method)
    try:
        yield
    finally:
        for (owner, name), own in before.items():
            if own is None:
                delattr(owner, name)  # back to the method of the class
            else:
                setattr(owner, name, own)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that contain an attention module with a layer index."""
    return [module for module in model.modules() if any(map(is_attention, module.children()))]


def _of_scorer(score: Method) -> Method:
    return lambda obs: checkpoint(score, obs, use_reentrant=False, preserve_rng_state=False)


def _of_layer(model: nn.Module, layer: nn.Module) -> Method:
    forward = layer.forward
    layer_idx: Any = next(child.layer_idx for child in layer.children() if is_attention(child))

    def checkpointed(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not isinstance(past_key_values, CompressedCache):
            return forward(*args, past_key_values=past_key_values, **kwargs)
        before, first = _copy_of(past_key_values, layer_idx), [past_key_values]

        def run(*args: Any) -> Any:
            if first:
                return forward(*args, past_key_values=first.pop(), **kwargs)
            cache = _copy_of(before, layer_idx)
            follow_cache(model, (), {"past_key_values": cache})  # another student may have run since
            return forward(*args, past_key_values=cache, **kwargs)

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    return checkpointed


def _copy_of(cache: CompressedCache, layer_idx: int) -> CompressedCache:
    """A cache with its own copy of one layer; appending to that layer leaves the original unchanged."""
    twin, layer = copy.copy(cache), cache.layers[layer_idx]
    twin.layers = list(cache.layers)
    twin.layers[layer_idx] = fork_of(layer)
    return twin
