"""Activation checkpointing of a student: what its layers and its scorer computed is computed again for the gradient."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.scorer import Scorer
from learnkv.inference.lora import follow_cache

Method = Callable[..., Any]


@contextmanager
def recomputed(model: nn.Module, scorer: Scorer | None = None) -> Iterator[None]:
    """Within the block, decoder layers that read a continuation with gradients, and the scorer, keep only their input.

    A layer appends what it reads to its cache, which must happen once: activations are computed again from a twin of
    the cache as it was before. Prompts, read without gradients, are read as ever.
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
                delattr(owner, name)  # the class's is seen again
            else:
                setattr(owner, name, own)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that an attention module with a number lies in."""
    return [one for one in model.modules() if any(map(_attends, one.children()))]


def _attends(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "o_proj")


def _of_scorer(score: Method) -> Method:
    return lambda obs: checkpoint(score, obs, use_reentrant=False, preserve_rng_state=False)


def _of_layer(model: nn.Module, layer: nn.Module) -> Method:
    forward = layer.forward
    at: Any = next(child.layer_idx for child in layer.children() if _attends(child))

    def read(*args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or not isinstance(past_key_values, CompressedCache):
            return forward(*args, past_key_values=past_key_values, **kwargs)
        as_it_was, first = _twin(past_key_values, at), [past_key_values]

        def once_more(*args: Any) -> Any:
            if first:
                return forward(*args, past_key_values=first.pop(), **kwargs)
            cache = _twin(as_it_was, at)
            follow_cache(model, (), {"past_key_values": cache})  # another student may have been read since
            return forward(*args, past_key_values=cache, **kwargs)

        return checkpoint(once_more, *args, use_reentrant=False, preserve_rng_state=False)

    return read


def _twin(cache: CompressedCache, at: int) -> CompressedCache:
    """A cache whose layer `at` may be added to while the other one's stays as it is."""
    twin, layer = copy.copy(cache), cache.layers[at]
    twin.layers = list(cache.layers)
    twin.layers[at] = layer.fork() if at in cache.compressible else copy.copy(layer)
    return twin
