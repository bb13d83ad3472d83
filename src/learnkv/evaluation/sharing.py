"""Sharing of scores between the budgets of one prompt, wherever they do not depend on the budget."""

import copy
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from learnkv.core.allocator import Allocator, Baseline
from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer, Scores
from learnkv.policy.policy import Policy


def for_one_prompt(policy: Policy) -> Policy:
    """A policy that decides as `policy` does about forks of one cache, and computes scores and features once.

    It serves one prompt. Merged tails are scored anew.
    """
    twin = copy.copy(policy)
    twin._modules = dict(policy._modules)
    if policy.scorer is not None:
        twin.scorer, twin.decode = _Scores(policy.scorer), policy.decode or policy.scorer
    twin.allocator = _Features(policy.allocator)
    return twin


class _Scores(Scorer):
    """The scores of `base`, computed once per layer; for scores that depend on the budget, the part that does not."""

    def __init__(self, base: Scorer) -> None:
        super().__init__()
        self.base = base
        self.needs, self.window, self.reads_budget = base.needs, base.window, base.reads_budget
        self.extra_passes = base.extra_passes
        self.scores: dict[int, Scores] = {}
        self.prepared: dict[int, tuple[Tensor, ...]] = {}

    def forward(self, obs: Observation) -> Tensor:
        return self.score(obs).scores

    def score(self, obs: Observation) -> Scores:
        layer, blind = obs.layer_idx, replace(obs, keep=None)  # a scorer that reads `keep` undeclared raises
        if self.reads_budget:
            if layer not in self.prepared:
                self.prepared[layer] = self.base.prepare(blind)
            prepared = self.prepared[layer]
            return Scores(self.base.decide(obs, prepared)) if prepared else self.base.score(obs)
        if layer not in self.scores:
            self.scores[layer] = self.base.score(blind)
        return self.scores[layer]

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def refines(self) -> bool:
        return self.base.refines

    def refine(self, obs: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        return self.base.refine(obs, scores, budgets)

    @property
    def refines_layers(self) -> bool:
        return self.base.refines_layers

    def refine_layers(self, observations: Sequence[Observation], scores: Tensor, budgets: Tensor) -> Tensor:
        return self.base.refine_layers(observations, scores, budgets)


class _Features(Allocator):
    """The budgets of `base`, whose features of a prompt are computed once per layer."""

    def __init__(self, base: Allocator) -> None:
        super().__init__()
        self.base = base
        self.static, self.sequential, self.window = base.static, base.sequential, base.window
        self.computed: dict[int, Tensor | None] = {}

    @property
    def name(self) -> str:
        return self.base.name

    def features(self, obs: Observation) -> Tensor | None:
        blind = replace(obs, keep=None)
        if not obs.aligned:  # after tokens were added
            return self.base.features(blind)
        if obs.layer_idx not in self.computed:
            self.computed[obs.layer_idx] = self.base.features(blind)
        return self.computed[obs.layer_idx]

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        return self.base(scores, features, budget)

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None) -> Tensor:
        return self.base.split(scores, features, budget, baseline)

    def ranking(
        self, scores: Tensor, features: Tensor | None, budget: Tensor, baseline: Baseline | None
    ) -> Tensor | None:
        return self.base.ranking(scores, features, budget, baseline)
