"""`Objective`, and its inputs: the outputs of one student and of its teacher."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.plan import Plan
from learnkv.core.scorer import Scorer
from learnkv.training.losses import sample_means


@dataclass(frozen=True)
class Outputs:
    """The model's outputs at the N counted tokens of a batch's continuations."""

    logits: Tensor
    """[N, V]."""
    hidden: tuple[Tensor, ...] = ()
    """[N, E] after every layer, the last one normalised; only for an objective that reads `hidden`."""


@dataclass(frozen=True)
class Comparison:
    """Inputs of an objective: the same prompts and continuations, read from the full cache and from a student's."""

    samples: int
    """B, prompts in the batch."""
    plan: Plan | None = None
    """The student's plan, with the gradient of its scores and budgets; None for an objective without `plans`."""
    targets: Mapping[Scorer, Tensor] = field(default_factory=dict)
    """Scores [L, B, H, S] of the prompts' entries by each of the objective's `targets`, -inf at padding."""
    sample: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    """[N] index of the prompt that each counted token belongs to."""
    weights: Tensor | None = None
    """[N] weight of each counted token; None: uniform."""
    teacher: Outputs | None = None
    """Outputs with the full cache; None for an objective that does not `read`."""
    student: Outputs | None = None
    """Outputs with the compressed cache."""

    @property
    def outputs(self) -> tuple[Outputs, Outputs]:
        """Teacher and student."""
        assert self.teacher is not None
        assert self.student is not None
        return self.teacher, self.student

    def means(self, tokens: Tensor) -> Tensor:
        """(Weighted) means [B] over the counted tokens of each prompt, from values [N]."""
        return sample_means(tokens, self.sample, self.samples, self.weights)


class Objective(Component, ABC):
    """A loss per prompt; its gradient reaches the student and the plan, never the teacher.

    The loss of a prompt must not depend on the other prompts of the batch: batches may be split over processes.
    """

    name: str = "loss"
    """In metrics: `train/NAME`."""
    reads: bool = True
    """Whether it needs continuations; without them there is no teacher and no student, only the plan."""
    hidden: bool = False
    """Whether it needs hidden states of the continuations."""
    plans: bool = False
    """Whether it needs the plan, also at keep=1."""
    budgets: bool = True
    """Whether it depends on the kept fraction; otherwise a prompt is planned once."""
    samples: int = 0
    """Samples of each plan that it compares (`over_samples`); 0: the plan itself has a student."""
    noise: float = 0.0
    """Scale of the Gumbel noise on the scores of a sample, in units of normal scores."""
    targets: tuple[Scorer, ...] = ()
    """Scorers whose scores of the prompt it needs; their extra passes are run."""

    def at_step(self, step: int) -> "Objective":
        """The objective that this optimiser step minimises."""
        return self

    @abstractmethod
    def forward(self, inputs: Comparison) -> Tensor:
        """Loss [B] of each prompt."""

    def over_samples(self, plan: Plan, drawn: Sequence[Plan], losses: Tensor) -> Tensor:
        """Loss [B] with the gradient of a plan, from the losses [N, B] of N samples of it."""
        raise NotImplementedError(f"{self.name}: has no samples")
