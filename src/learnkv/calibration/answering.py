"""Attention of each layer while an answer is decoded."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.inference.prefill import prefill


@torch.no_grad()
def answer_observations(model: Any, prompt: Tensor, answer: Tensor) -> Iterator[Observation]:
    """Observation of every layer where the last token of `answer` [1, A] is predicted after `prompt` [1, S].

    The window's queries are those that predict the A tokens.
    """
    cache = prefill(model, torch.cat([prompt, answer[:, :-1]], 1).to(model.device), window=answer.shape[1])
    for layer in cache.compressed_layers():
        yield layer.observation()


def attention(obs: Observation, valid: Tensor | None = None) -> Tensor:
    """Attention weights [H, G, A, S] of the answer's queries over all entries, or over the `valid` ones [1, H, S]."""
    masked = obs if valid is None else dataclasses.replace(obs, valid=valid & obs.valid)
    return masked.window_attention(obs.queries.shape[2])[0][0]
