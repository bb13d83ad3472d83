"""Means of a model's queries at each RoPE frequency, for TriAttention."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats.tensors import stack
from learnkv.inference.prefill import prefill
from learnkv.ops.rotary import Layout
from learnkv.policy.policy import Policy
from learnkv.scorers import TriAttention
from learnkv.scorers.triattention import QueryFrequencies

_PHASE = 1e-3
"""Radians over a context by which two measurements of a frequency may differ."""


@torch.no_grad()
def query_frequencies(model: Any, contexts: Iterable[Tensor]) -> dict[str, Tensor]:
    """The tensors of `formats.tensors.FREQUENCIES` over all queries of contexts [1, S], after q_norm, before RoPE.

    Raises:
        UserError: for a rotation that is not the same at all lengths of context.
    """
    sums: list[dict[str, Tensor]] = []
    rotations: list[dict[str, Tensor]] = []
    tokens = 0
    for context in contexts:
        cache = prefill(model, context.to(model.device), window=0, policies=[Policy(TriAttention())])
        observations = [layer.observation() for layer in cache.compressed_layers()]
        length, tokens = context.shape[1], tokens + context.shape[1]
        new = [_sums(obs, length) for obs in observations]
        zeros = [{name: torch.zeros_like(part) for name, part in layer.items()} for layer in new]
        sums = [
            {name: total[name] + part[name] for name in total} for total, part in zip(sums or zeros, new, strict=True)
        ]
        own = [_rotation(obs) for obs in observations]
        rotations = rotations or own
        for layer_idx, (first, other) in enumerate(zip(rotations, own, strict=True)):
            apart = (first["frequency"] - other["frequency"]).abs().max() * length
            if apart > _PHASE or not torch.allclose(first["scale"], other["scale"], rtol=1e-3):
                raise UserError(
                    f"query_frequencies: layer {layer_idx} rotates by others in a context of {length} tokens; "
                    "expected a model whose rotation does not depend on the length"
                )
    means = [{name: total / tokens for name, total in layer.items()} for layer in sums]
    return stack([{**mean, **rotation} for mean, rotation in zip(means, rotations, strict=True)])


def _sums(obs: Observation, length: int) -> dict[str, Tensor]:
    """Sums over the queries of one layer: `mean` [N, D] and `magnitude` [N, F], both times the number of queries."""
    gathered = length * obs.statistics[QueryFrequencies()][0].flatten(0, 1).double()
    dim = obs.keys.shape[3]
    return {"mean": gathered[:, :dim], "magnitude": gathered[:, dim:]}


def _rotation(obs: Observation) -> dict[str, Tensor]:
    """`frequency` [F], `scale` [F] and `layout` [4] of one layer."""
    rope = obs.rope
    layout = Layout.halves(obs.keys.shape[3] // 2) if rope is None else rope.layout
    if rope is None:
        frequency, scale = torch.zeros(layout.pairs), torch.ones(layout.pairs)
    else:
        frequency = rope.frequencies(obs.length)
        scale = torch.hypot(*(part[0, 0] for part in rope.after(obs.length, 1)))
    return {"frequency": frequency.double(), "scale": scale.double(), "layout": torch.tensor(layout).double()}
