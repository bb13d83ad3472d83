"""HeteroCache's kinds of heads, from attention to contexts while questions about them are read and answered."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from learnkv.calibration.answering import answer_observations, attention
from learnkv.calibration.trials import Trial
from learnkv.ops.head_taxonomy import Taxonomy, taxonomy, top_sets

TOP = 1024 / 5000
"""Part of a context that counts as a head's best entries; the authors take 1,024 of 5,000."""


@torch.no_grad()
def head_kinds(model: Any, trials: Sequence[Trial], stable: float = 0.5) -> Taxonomy:
    """Kinds of heads over the trials' contexts (HeteroCache, arXiv 2601.13684).

    Steps are the tokens of the question and its answer, as many as the shortest of them has. Heads whose median overlap
    is below `stable` are volatile.
    """
    by_trial = [_sets(model, trial) for trial in trials]
    longest = max(sets[0].shape[-1] for layers in by_trial for sets in layers)
    steps = min(len(sets) for layers in by_trial for sets in layers)
    layers = []
    for of_layer in zip(*by_trial, strict=True):
        padded = [[F.pad(step, (0, longest - step.shape[-1])) for step in sets[:steps]] for sets in of_layer]
        layers.append([torch.cat(step) for step in zip(*padded, strict=True)])
    return taxonomy(layers, stable)


def _sets(model: Any, trial: Trial) -> list[list[Tensor]]:
    """Best entries [1, H, S] of a context of S tokens, for every layer and for each query from its last one on."""
    length = trial.context.shape[1]
    later = torch.cat([trial.question, trial.answer], 1)
    layers = []
    for obs in answer_observations(model, trial.context, later):
        weights = attention(obs)[..., :length].movedim(2, 0)  # [A, H, G, S]
        layers.append([top_sets(step.unsqueeze(0), max(round(TOP * length), 1)).cpu() for step in weights])
    return layers
