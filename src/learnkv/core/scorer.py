"""The importance of cache entries."""

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from learnkv.core.component import Component
from learnkv.core.observation import CaptureSpec, Observation, PromptPass, Statistic
from learnkv.errors import UserError


class Scores(NamedTuple):
    """Scores of one layer and, for a learned scorer, the baseline that they correct."""

    scores: Tensor
    """[B, H, S]."""
    baseline: Tensor | None = None
    """[B, H, S] the heuristic's own scores."""
    baseline_scaled: Tensor | None = None
    """[B, H, S] the same in the units of `scores`, which are these plus the learned correction."""
    unprotected: Tensor | None = None
    """[B, H, S] for a learned scorer, once masked: scores of all entries, those that are protected, too."""

    def masked(self, absent: Tensor, protected: Tensor) -> "Scores":
        """The same in float32 with -inf and +inf where these [B, H, S] are True."""
        present = [None if part is None else part.float().masked_fill(absent, -torch.inf) for part in self[:3]]
        scores, baseline, scaled = (
            None if part is None else part.masked_fill(protected, torch.inf) for part in present
        )
        assert scores is not None
        return Scores(scores, baseline, scaled, None if baseline is None else present[0])


class Scorer(Component, ABC):
    """Gives every entry of one layer a score; entries with higher scores are kept.

    A heuristic is a scorer without parameters. A scorer must not read entries that are not `valid` and must give a
    row of a batch the scores that the row would get alone; what it returns for entries that are not valid is ignored.
    """

    needs: frozenset[str] = frozenset()
    """Parts of the observation that exist for a prompt only: `rope`, `is_image`, on demand `hidden` and `token_ids`."""
    functions: frozenset[str] = frozenset()
    """Functions of the layer that the scorer applies: `rotation` for `obs.rope`, `projection` for `obs.projection`."""
    window: int = 0
    """Number of last prompt queries that the scorer reads (0: none)."""
    statistics: frozenset[Statistic] = frozenset()
    """Running results over the prompt that the scorer reads."""
    extra_passes: frozenset[PromptPass] = frozenset()
    """Extra passes of the model over the prompt whose results the scorer reads."""
    reads_budget: bool = False
    """Whether scores depend on how much will be kept (`obs.kept`); those of others serve all budgets."""
    __call__: Callable[..., Tensor]

    @property
    def capture_spec(self) -> CaptureSpec:
        """What a prefill captures for this scorer and those within it."""
        return functools.reduce(operator.or_, (scorer.own_capture_spec for scorer in self._scorers()))

    @property
    def decode_capture(self) -> frozenset[Statistic]:
        """Statistics that are kept with every entry where this scorer and those within it score decoded tokens, too."""
        return frozenset().union(*(scorer.own_decode_capture for scorer in self._scorers()))

    @property
    def own_capture_spec(self) -> CaptureSpec:
        """`capture_spec` of this scorer alone."""
        spec = CaptureSpec(self.window, "hidden" in self.needs, self.statistics, self.extra_passes, self.functions)
        return replace(spec, token_ids="token_ids" in self.needs)

    @property
    def own_decode_capture(self) -> frozenset[Statistic]:
        """`decode_capture` of this scorer alone."""
        return self.statistics

    def _scorers(self) -> list["Scorer"]:
        return [module for module in self.modules() if isinstance(module, Scorer)]

    @abstractmethod
    def forward(self, obs: Observation) -> Tensor:
        """Scores [B, H, S], float32."""

    def prepare(self, obs: Observation) -> tuple[Tensor, ...]:
        """The part of a budget-dependent scorer's work that is the same for every budget of one prompt."""
        return ()

    def decide(self, obs: Observation, prepared: tuple[Tensor, ...]) -> Tensor:
        """The scores [B, H, S] of `forward`, from the result of `prepare` for the same prompt."""
        return self(obs)

    def score(self, obs: Observation) -> Scores:
        """The result of `forward`, with its baseline."""
        return Scores(self(obs))

    @property
    def refines(self) -> bool:
        """Whether `refine` may change scores."""
        return type(self).refine is not Scorer.refine

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores [B, H, S] that rank within each head, for a method that needs to know how many entries it keeps.

        Args:
            scores: [B, H, S] from `forward`, +inf for protected entries and -inf where there is none; these stay as
                they are, whatever is returned for them.
            budgets: [B, H] entries that every head keeps, protected ones included.
        """
        return scores

    @property
    def refines_layers(self) -> bool:
        """Whether `refine_layers` may change scores; then no layer is evicted before all have been read."""
        return type(self).refine_layers is not Scorer.refine_layers

    def refine_layers(self, observations: Sequence[Observation], scores: Tensor, budgets: Tensor) -> Tensor:
        """Scores [L, B, H, S] that rank within each head, for a method whose heads or layers choose together.

        `refine` follows. Slots are the same tokens in all heads and layers where the observations are `aligned`.

        Args:
            observations: of all layers.
            scores: [L, B, H, S] from `forward`, +inf for protected entries and -inf where there is none; these stay as
                they are, whatever is returned for them.
            budgets: [L, B, H] entries that every head keeps, protected ones included.
        """
        return scores

    def carry(self, obs: Observation, budgets: Tensor) -> Mapping[Statistic | PromptPass, Tensor]:
        """Statistics of the entries as later evictions shall find them, [B, H, S, F] each, for a method with a memory.

        Called for each eviction of a policy that evicts again, with the observation that `refine` had.

        Args:
            budgets: [B, H] entries that every head keeps, protected ones included.
        """
        return {}

    def carry_layers(
        self, observations: Sequence[Observation], budgets: Tensor
    ) -> Sequence[Mapping[Statistic | PromptPass, Tensor]]:
        """The results of `carry` for layers that are evicted together, for a method whose layers remember together.

        Args:
            observations: of L layers: all of the model where `refine_layers` ranks, else possibly one.
            budgets: [L, B, H].
        """
        return [self.carry(obs, kept.to(obs.keys.device)) for obs, kept in zip(observations, budgets, strict=True)]

    def _builds_on(self, base: "Scorer") -> None:
        """Require everything that `base` reads; UserError for one that ranks by a head's budget (`refines`)."""
        if base.refines or base.refines_layers:
            raise UserError(f"base={type(base).__name__}: ranks by a head's budget, {type(self).__name__} needs scores")
        self.needs, self.window = base.needs, base.window
        self.extra_passes = base.extra_passes
        self.reads_budget = self.reads_budget or base.reads_budget
