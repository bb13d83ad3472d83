"""Per-token features of learned scorers, computed when a token is read and kept with the cache."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learnkv.core.observation import Observation, Statistic


@dataclass(frozen=True)
class FeatureKey:
    """Names the function that made features: those with equal keys are the same."""

    scorer: str
    """Class and settings."""
    weights: int | str
    """Checksum of the weights."""


@dataclass(frozen=True)
class CachedFeatures(Statistic):
    """Features [B, H, S, F] of every token, or [B, 1, S, F] where all heads share them; found in a cache by `key`.

    Args:
        key: what they are found by; nothing else is compared.
        compute: from an observation of some tokens to their features.
        hidden: whether that reads hidden states.
    """

    key: FeatureKey
    compute: Callable[[Observation], Tensor] = field(compare=False, repr=False)
    hidden: bool = field(compare=False)

    def __deepcopy__(self, _: object) -> "CachedFeatures":
        """Itself: the copy of a cache is served by the same scorer."""
        return self

    def update(self, chunk: Observation, gathered: Tensor | None) -> Tensor:
        new = slice(chunk.keys.shape[2] - chunk.queries.shape[2], None)
        hidden = None if chunk.hidden is None else chunk.hidden[:, -chunk.queries.shape[2] :]
        features = self.compute(chunk.of_tokens(new, hidden))
        if gathered is None:
            return features
        return torch.cat([gathered, features.expand(-1, gathered.shape[1], -1, -1)], 2)
