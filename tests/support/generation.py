"""The same generation by transformers and by learnkv."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch

from learnkv import generate, prefill
from support.models import attached, padded, plain

NEW = 9


@contextlib.contextmanager
def configured(asked: dict[str, Any]) -> Iterator[Any]:
    """The untouched model and the attached one with these settings in their generation configs."""
    models = plain("llama"), attached("llama")
    before = [model.generation_config for model in models]
    try:
        for model, original in zip(models, before, strict=True):
            model.generation_config = copy.deepcopy(original)
            for name, value in asked.items():
                setattr(model.generation_config, name, value)
        yield models
    finally:
        for model, original in zip(models, before, strict=True):
            model.generation_config = original


def theirs(model: Any, prompts: Any, questions: Any, **call: Any) -> list[list[int]] | None:
    """What transformers generates; None where it fails."""
    ids, mask = padded([torch.cat(pair) for pair in zip(prompts, questions, strict=True)])
    ids = ids.masked_fill(mask == 0, 0)
    try:
        said = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **call)
    except (ValueError, RuntimeError, TypeError, IndexError, OSError, ImportError, AttributeError):
        return None
    return (said if torch.is_tensor(said) else said.sequences)[:, ids.shape[1] :].tolist()


def ours(model: Any, prompts: Any, questions: Any, **call: Any) -> list[list[int]]:
    ids, mask = padded(questions, "right")
    prompt_ids, prompt_mask = padded(prompts)
    cache = prefill(model, prompt_ids.masked_fill(prompt_mask == 0, 0), prompt_mask)
    return generate(model, ids.masked_fill(mask == 0, 0), cache, mask, max_new_tokens=NEW, **call).tolist()


def until_end(row: list[int], ends: list[int]) -> list[int]:
    first = next((index for index, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]
