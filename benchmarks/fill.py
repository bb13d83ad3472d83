"""Caches as they are after a long prompt, filled with random numbers instead of reading one."""

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from benchmarks.shapes import Shape
from benchmarks.sweeps.decode import row_lengths
from learnkv import CompressedCache


def compressed(model: PreTrainedModel, shape: Shape, batch: int, kept: int, skew: str) -> CompressedCache:
    """What `prefill` and a policy leave: `kept` entries per head on average, chosen at random by the ops of eviction.

    Layers are filled and evicted one after the other, and the prompt is no longer than its longest head: neither
    changes what a decode step does, and a full cache of the prompt need not fit beside it.
    """
    lengths = row_lengths(batch, shape.kv_heads, kept, skew)
    slots = max(lengths)
    device, dtype = model.device, model.dtype
    cache = CompressedCache(model.config)
    cache.set_prompt([slots] * batch)
    budgets = torch.tensor(lengths, device=device).view(1, batch, shape.kv_heads)
    for at, layer in enumerate(cache.compressed_layers()):
        layer.expects_attention = True  # as the hook before a model's attention does
        layer.update(*_random(batch, shape, slots, device, dtype))
        scores = torch.rand(1, batch, shape.kv_heads, slots, device=device)
        cache.evict(scores, budgets, sum(lengths), first=at)
    cache.budgets = budgets.expand(shape.layers, batch, shape.kv_heads)
    return cache


def dynamic(model: PreTrainedModel, shape: Shape, batch: int, prompt: int) -> DynamicCache:
    """Default cache of transformers."""
    cache = DynamicCache(config=model.config)
    for at in range(shape.layers):
        cache.update(*_random(batch, shape, prompt, model.device, model.dtype), at)
    return cache


def static(model: PreTrainedModel, shape: Shape, batch: int, prompt: int, slots: int) -> StaticCache:
    """Cache of transformers of a fixed size, `prompt` of its slots used."""
    cache = StaticCache(config=model.config, max_cache_len=slots)
    for at in range(shape.layers):
        cache.update(*_random(batch, shape, prompt, model.device, model.dtype), at)
    return cache


def _random(batch: int, shape: Shape, slots: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    size = (batch, shape.kv_heads, slots, shape.dim)
    return [torch.randn(size, device=device, dtype=dtype) for _ in range(2)]
