"""How learned budgets depend on the kept fraction and on the prompt."""

import math

import torch
from torch import Tensor, nn

from learnkv.core.observation import Observation
from learnkv.ops.device import upload
from learnkv.ops.window_scores import window_scores

KNOTS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6)
"""Kept fractions at which learned budgets are stored; between them they are linear in log keep, outside constant."""

_TOP = 0.05  # fraction of the entries that counts as the top of a head's attention
_SINKS = 4


def interpolation_weights(keep: Tensor) -> Tensor:
    """Weights of linear interpolation in log keep between the knots, [B, M] for keep [B]; they sum to 1."""
    knots = upload(KNOTS, keep.device, torch.float64).log()
    log_keep = keep.double().clamp(KNOTS[0], KNOTS[-1]).log()
    right = torch.searchsorted(knots, log_keep).clamp(1, len(KNOTS) - 1)
    share = ((log_keep - knots[right - 1]) / (knots[right] - knots[right - 1])).clamp(0, 1)
    basis = torch.zeros(keep.shape[0], len(KNOTS), dtype=torch.float64, device=keep.device)
    return (
        basis.scatter(1, (right - 1)[:, None], (1 - share)[:, None]).scatter(1, right[:, None], share[:, None]).float()
    )


def attention_features(obs: Observation, window: int) -> Tensor:
    """Concentration of the attention of the last `window` prompt queries, [B, H, 3] float32, each within [0, 1].

    Entropy over its maximum, mass of the top 5 % of the entries, mass of the first 4 entries.
    """
    attention = window_scores(
        obs.queries[:, :, -window:],
        obs.keys,
        query_positions=obs.query_positions[:, -window:],
        positions=obs.positions,
        valid=obs.valid,
        scaling=obs.scaling,
        terms=obs.terms,
        kernel_size=1,
    )
    share = attention / attention.sum(-1, keepdim=True).clamp_min(1e-30)
    entries = obs.valid.sum(-1)
    entropy = -torch.special.xlogy(share, share).sum(-1) / entries.clamp_min(2).log()
    mass = share.sort(dim=-1, descending=True).values.cumsum(-1)
    top = mass.gather(-1, ((entries * _TOP).ceil().long() - 1).clamp_min(0).unsqueeze(-1)).squeeze(-1)
    sinks = torch.where(obs.valid & (obs.positions < _SINKS), share, 0.0).sum(-1)
    return torch.stack([entropy, top, sinks], -1)


class Conditioner(nn.Module):
    """A correction of budget logits from features of the prompt: one network for all places, zero at initialisation.

    Args:
        places: layers, or (layer, head) pairs, that get a correction; each has an embedding of its own.
        width: hidden units.
        features: F, `attention_features` if not given.
    """

    FEATURES = 3

    def __init__(self, places: int, width: int = 16, embedding: int = 8, features: int = FEATURES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(places, embedding, dtype=torch.float32)
        self.hidden = nn.Linear(features + 2 + embedding, width, dtype=torch.float32)
        self.out = nn.Linear(
            width, 1, bias=False, dtype=torch.float32
        )  # what is added to all places alike changes no budget
        nn.init.zeros_(self.out.weight)

    def forward(self, features: Tensor, keep: Tensor, entries: Tensor, first: int = 0) -> Tensor:
        """Corrections [B, P] of features [B, P, F].

        Args:
            keep: [B] kept fractions.
            entries: [B] entries of the prompts.
            first: place of the first of the P features.
        """
        batch, places, _ = features.shape
        scalars = torch.stack(
            [keep.clamp_min(1e-6).log() / math.log(10), entries.clamp_min(1).log() / math.log(1e4)], -1
        )
        scalars = scalars.float()[:, None].expand(batch, places, 2)
        place = self.embedding.weight[first : first + places].expand(batch, places, -1)
        inputs = torch.cat([features, scalars, place], -1)
        corrections: Tensor = self.out(nn.functional.gelu(self.hidden(inputs))).squeeze(-1)
        return corrections
