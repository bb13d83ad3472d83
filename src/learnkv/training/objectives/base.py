"""What a student is compared to its teacher by."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.plan import Plan
from learnkv.core.scorer import Scorer
from learnkv.training.losses import sample_means


@dataclass(frozen=True)
class Outputs:
    """What the model computed at the N counted tokens of a batch's continuations."""

    logits: Tensor
    """[N, V]."""
    hidden: tuple[Tensor, ...] = ()
    """[N, E] after every layer, the last one normalised; only for an objective that reads `hidden`."""


@dataclass(frozen=True)
class Comparison:
    """One student beside its teacher: the same prompts and continuations, read from all of the cache or from a part."""

    samples: int
    """B, prompts in the batch."""
    plan: Plan | None = None
    """What the student keeps, with the gradient of its scores and budgets; None for an objective without `plans`."""
    targets: Mapping[Scorer, Tensor] = field(default_factory=dict)
    """[L, B, H, S] what the objective's `targets` give the entries of the prompts, -inf at padding."""
    sample: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """[N] number of the prompt that each counted token belongs to."""
    weights: Tensor | None = None
    """[N] how much each counted token counts; None: all alike."""
    both: tuple[Outputs, Outputs] | None = None
    """Teacher and student; None for an objective that does not `read`."""

    @property
    def said(self) -> tuple[Outputs, Outputs]:
        """Teacher and student."""
        assert self.both is not None
        return self.both

    def means(self, tokens: Tensor) -> Tensor:
        """(Weighted) means [B] over the counted tokens of each prompt, from figures [N]."""
        return sample_means(tokens, self.sample, self.samples, self.weights)


class Objective(Component, ABC):
    """A loss per prompt; its gradient reaches the student and the plan, never the teacher.

    What a prompt's loss is must not depend on the other prompts of the batch: batches may be split over processes.
    """

    name: str = "loss"
    """In metrics: `train/NAME`."""
    reads: bool = True
    """Whether it looks at continuations; without them there is neither teacher nor student, only the plan."""
    hidden: bool = False
    """Whether it looks at hidden states of the continuations."""
    plans: bool = False
    """Whether it looks at the plan, also at keep=1."""
    budgets: bool = True
    """Whether it depends on how much is kept; otherwise one plan of a prompt says all."""
    targets: tuple[Scorer, ...] = ()
    """Scorers whose scores of the prompt it looks at; extra passes that they ask for are made."""

    def at(self, step: int) -> "Objective":
        """What is minimised at an optimiser step."""
        return self

    @abstractmethod
    def forward(self, seen: Comparison) -> Tensor:
        """Loss [B] of each prompt."""
