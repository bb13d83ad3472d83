"""transformers' own `generate()` with its own caches, as shipped: what a user gets who does nothing."""

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

DYNAMIC, STATIC = "HF DynamicCache", "HF StaticCache compiled"


def step_us(
    model: PreTrainedModel, cache: Cache, prompt: int, batch: int, rewind: Callable[[int], None], steps: tuple[int, int]
) -> float:
    """Microseconds per token: the difference between generating more and fewer tokens after a prompt that is cached.

    Args:
        rewind: told how many tokens the cache has read beyond the prompt, takes them back.
        steps: fewer and more new tokens.
    """
    ids = torch.randint(1, model.config.vocab_size, (batch, prompt + 1), device=model.device)
    spent = []
    for new in steps:
        _synchronize(model.device)
        begin = time.perf_counter()
        # No padding: what transformers makes of a mask of ones is part of what is measured.
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        _synchronize(model.device)
        spent.append(time.perf_counter() - begin)
        rewind(new)
    return 1e6 * (spent[1] - spent[0]) / (steps[1] - steps[0])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
