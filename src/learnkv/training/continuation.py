"""What the model says after a prompt, read as it would be said: a cache that evicts on the way does so on the way."""

from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generate import continuation, continuation_states


def read_on(
    model: Any, ids: Tensor, cache: CompressedCache, mask: Tensor, hidden: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits [R, T, V] of continuations [R, T] and, if asked for, hidden states [R, T, E] after every layer.

    A cache that stays within its budget while tokens are added (`Policy(every=…)`) reads as many tokens at once as it
    may hold beside it, and evicts before the next ones, students included. Other caches read all at once.
    """
    step = ids.shape[1] if cache.schedule is None else cache.schedule.evict_interval
    logits: list[Tensor] = []
    states: list[list[Tensor]] = []
    for part, known in zip(ids.split(step, 1), mask.split(step, 1), strict=True):
        cache.evict_if_due()
        if hidden:
            said, after = continuation_states(model, part, cache, known)
            states.append(after)
        else:
            said = continuation(model, part, cache, known)
        logits.append(said)
    return torch.cat(logits, 1), tuple(torch.cat(one, 1) for one in zip(*states, strict=True))
