"""What each layer attends to while an answer is given."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.inference.prefill import prefill


@torch.no_grad()
def answering(model: Any, before: Tensor, said: Tensor) -> Iterator[Observation]:
    """Every layer at the moment when the last token of `said` [1, A] is predicted after the prompt `before` [1, S].

    The queries of its window are those that predict the A tokens.
    """
    cache = prefill(model, torch.cat([before, said[:, :-1]], 1).to(model.device), window=said.shape[1])
    for layer in cache.compressed_layers():
        yield layer.observation()


def attention(obs: Observation, valid: Tensor | None = None) -> Tensor:
    """Weights [H, G, A, S] of the answer's queries over everything, or over what is `valid` [1, H, S]."""
    among = obs if valid is None else dataclasses.replace(obs, valid=valid & obs.valid)
    return among.window_attention(obs.queries.shape[2])[0][0]
