"""Reading given tokens after a compressed prompt, as generation would read them."""

from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generate import continuation


def read(model: Any, ids: Tensor, cache: CompressedCache, mask: Tensor | None = None, together: int = 1) -> Tensor:
    """Logits [B, T, V] of tokens [B, T] read after a prompt.

    With page selection and online eviction they are read one by one, as in generation: several at once would read all
    pages, and evict late.

    Args:
        mask: [B, T] True for tokens, False for padding on the right; None: no padding.
        together: first tokens that generation reads at once, too.
    """
    one_by_one = cache.read != cache.spent or cache.schedule is not None
    sizes = [together] + [1] * (ids.shape[1] - together) if one_by_one else [ids.shape[1]]
    parts = ids.split(sizes, 1)
    masks = [None] * len(parts) if mask is None or bool(mask.all()) else mask.split(sizes, 1)
    with torch.no_grad():
        return torch.cat([continuation(model, part, cache, of) for part, of in zip(parts, masks, strict=True)], 1)


def kl_divergence(full: Tensor, logits: Tensor) -> float:
    """KL of the model with all entries from the model with some, in nats per token, of logits [T, V]."""
    teacher, student = full.float().log_softmax(-1), logits.float().log_softmax(-1)
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())
