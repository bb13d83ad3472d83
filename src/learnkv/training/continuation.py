"""Outputs of the model on continuations, with online eviction as at deployment."""

from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generate import continuation, continuation_states


def continuation_outputs(
    model: Any, ids: Tensor, cache: CompressedCache, mask: Tensor, hidden: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [R, T, V] of continuations [R, T] and, with `hidden`, hidden states [R, T, E] after every layer.

    With online eviction (`Policy(evict_interval=…)`) continuations are read in chunks of `evict_interval` tokens; the
    cache evicts before each chunk, students' caches too. Other caches read all tokens at once.
    """
    step = ids.shape[1] if cache.schedule is None else cache.schedule.evict_interval
    logits: list[Tensor] = []
    states: list[list[Tensor]] = []
    for chunk, chunk_mask in zip(ids.split(step, 1), mask.split(step, 1), strict=True):
        cache.evict_if_due()
        if hidden:
            chunk_logits, chunk_states = continuation_states(model, chunk, cache, chunk_mask)
            states.append(chunk_states)
        else:
            chunk_logits = continuation(model, chunk, cache, chunk_mask)
        logits.append(chunk_logits)
    return torch.cat(logits, 1), tuple(torch.cat(layer, 1) for layer in zip(*states, strict=True))
