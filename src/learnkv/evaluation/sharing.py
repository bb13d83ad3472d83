"""A prompt is judged once for all budgets, wherever a policy's judgement does not depend on the budget."""

import copy
from dataclasses import replace

from torch import Tensor

from learnkv.core.allocator import Allocator, Baseline
from learnkv.core.observation import Observation
from learnkv.core.scorer import Scorer, Scores
from learnkv.policy.policy import Policy


def for_one_prompt(policy: Policy) -> Policy:
    """A policy that decides as `policy` does about forks of one cache, and remembers what it was told of each layer.

    It is for one prompt: what it remembers is not asked again. Tokens that come later are judged anew.
    """
    twin = copy.copy(policy)
    twin._modules = dict(policy._modules)
    if policy.scorer is not None:
        twin.scorer, twin.decode = _Scores(policy.scorer), policy.decode or policy.scorer
    twin.allocator = _Features(policy.allocator)
    return twin


class _Scores(Scorer):
    """The scores of `base`, asked for once per layer; of scores that depend on how much will be kept, what does not."""

    def __init__(self, base: Scorer) -> None:
        super().__init__()
        self.base = base
        self.needs, self.window, self.reads_budget = base.needs, base.window, base.reads_budget
        self.extra_passes = base.extra_passes
        self.known: dict[int, Scores] = {}
        self.prepared: dict[int, tuple[Tensor, ...]] = {}

    def forward(self, seen: Observation) -> Tensor:
        return self.judge(seen).scores

    def judge(self, seen: Observation) -> Scores:
        layer, blind = seen.layer_idx, replace(seen, keep=None)  # one that reads `keep` after all fails, it cannot lie
        if self.reads_budget:
            if layer not in self.prepared:
                self.prepared[layer] = self.base.prepare(blind)
            known = self.prepared[layer]
            return Scores(self.base.decide(seen, known)) if known else self.base.judge(seen)
        if layer not in self.known:
            self.known[layer] = self.base.judge(blind)
        return self.known[layer]

    @property
    def refines(self) -> bool:
        return self.base.refines

    def refine(self, seen: Observation, scores: Tensor, budgets: Tensor) -> Tensor:
        return self.base.refine(seen, scores, budgets)


class _Features(Allocator):
    """The budgets of `base`, which looks at each layer once."""

    def __init__(self, base: Allocator) -> None:
        super().__init__()
        self.base = base
        self.static, self.sequential, self.window = base.static, base.sequential, base.window
        self.known: dict[int, Tensor | None] = {}

    def features(self, seen: Observation) -> Tensor | None:
        if seen.layer_idx not in self.known:
            self.known[seen.layer_idx] = self.base.features(replace(seen, keep=None))
        return self.known[seen.layer_idx]

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        return self.base(scores, features, budget)

    def split(self, scores: Tensor, features: Tensor | None, budget: Tensor, start: Baseline | None) -> Tensor:
        return self.base.split(scores, features, budget, start)
