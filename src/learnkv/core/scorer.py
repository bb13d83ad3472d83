"""The importance of cache entries."""

import functools
import operator
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.observation import CaptureSpec, Observation, PromptPass, Statistic
from learnkv.errors import UserError


class Scores(NamedTuple):
    """Scores of one layer and, where something was learned, what they were before."""

    scores: Tensor
    """[B, H, S]."""
    start: Tensor | None = None
    """[B, H, S] the heuristic's own scores."""
    prior: Tensor | None = None
    """[B, H, S] the same in the units of `scores`: these are `prior` plus what was learned."""

    def masked(self, absent: Tensor, protected: Tensor) -> "Scores":
        """The same in float32 with -inf and +inf where these [B, H, S] are True."""
        scores, start, prior = (
            None if one is None else one.float().masked_fill(absent, -torch.inf).masked_fill(protected, torch.inf)
            for one in self
        )
        assert scores is not None
        return Scores(scores, start, prior)


class Scorer(Component, ABC):
    """Gives every entry of one layer a score; entries with higher scores are kept.

    A heuristic is a scorer without parameters. A scorer must not look at entries that are not `valid` and must give a
    row of a batch the scores that the row would get alone; what it returns for entries that are not valid is ignored.
    """

    needs: frozenset[str] = frozenset()
    """Parts of the observation that there are for a prompt only: `hidden`, which is recorded on demand, and `rope`."""
    window: int = 0
    """Number of last prompt queries that the scorer reads (0: none)."""
    statistics: frozenset[Statistic] = frozenset()
    """What is to be gathered from all queries while the prompt is read."""
    extra_passes: frozenset[PromptPass] = frozenset()
    """What is to be found out by extra passes of the model."""
    reads_budget: bool = False
    """Whether scores depend on how much will be kept (`seen.kept`); others are asked for once for all budgets."""

    @property
    def capture_spec(self) -> CaptureSpec:
        """What has to be recorded of a prompt for this scorer and those within it."""
        return functools.reduce(operator.or_, (one.own_capture_spec for one in self._scorers()))

    @property
    def decode_capture(self) -> frozenset[Statistic]:
        """What has to be gathered with every entry for them where tokens that come after the prompt are judged, too."""
        return frozenset().union(*(one.own_decode_capture for one in self._scorers()))

    @property
    def own_capture_spec(self) -> CaptureSpec:
        """`recording` for this scorer alone."""
        return CaptureSpec(self.window, "hidden" in self.needs, self.statistics, self.extra_passes)

    @property
    def own_decode_capture(self) -> frozenset[Statistic]:
        """`later` for this scorer alone."""
        return self.statistics

    def _scorers(self) -> list["Scorer"]:
        return [one for one in self.modules() if isinstance(one, Scorer)]

    @abstractmethod
    def forward(self, obs: Observation) -> Tensor:
        """Scores [B, H, S], float32."""

    def prepare(self, obs: Observation) -> tuple[Tensor, ...]:
        """What a scorer that reads the budget computes without it; the same for every budget of one prompt."""
        return ()

    def decide(self, obs: Observation, prepared: tuple[Tensor, ...]) -> Tensor:
        """The scores [B, H, S] of `forward`, from what `prepare` gave for the same prompt."""
        return self(obs)

    def judge(self, obs: Observation) -> Scores:
        """What `forward` returns, with what it starts from."""
        return Scores(self(obs))

    @property
    def refines(self) -> bool:
        """Whether `refine` may change scores."""
        return type(self).refine is not Scorer.refine

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores [B, H, S] that decide within each head, for a method that needs to know how many entries it keeps.

        Args:
            scores: [B, H, S] what `forward` returned, +inf for protected entries and -inf where there is none; these
                stay as they are, whatever is returned for them.
            budgets: [B, H] entries that every head keeps, protected ones included.
        """
        return scores

    def _builds_on(self, base: "Scorer") -> None:
        """Ask for everything that `base` reads; UserError for one that ranks by a head's budget (`refines`)."""
        if base.refines:
            raise UserError(f"base={type(base).__name__}: ranks by a head's budget, {type(self).__name__} needs scores")
        self.needs, self.window = base.needs, base.window
        self.extra_passes = base.extra_passes
        self.reads_budget = self.reads_budget or base.reads_budget
