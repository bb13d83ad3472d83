"""The description of a LoRA adapter that was trained beside a policy."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

PREFIX = "learnkv"
"""Prefix of the names of learnkv's adapters; a model's other adapters are left alone."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter (arXiv 2106.09685) that was trained beside a policy.

    Args:
        rank: of the correction of every matrix.
        alpha: the correction is multiplied by alpha / rank.
        targets: names of the linear modules that are corrected.
        state: weights by peft's names; empty while it is trained, when the model has its weights.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def name(self) -> str:
        """Its name in the model: a digest of its weights, so that it is loaded once; every pass of the model reads it.

        Computed once: the weights of `state` must not change.
        """
        if not self.state:
            return PREFIX
        digest = hashlib.sha256(repr((self.rank, self.alpha, self.targets)).encode())
        for key in sorted(self.state):
            digest.update(key.encode() + self.state[key].float().cpu().numpy().tobytes())
        return f"{PREFIX}_{digest.hexdigest()[:16]}"
