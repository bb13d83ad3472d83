"""Scores and budgets that are not numbers, or of a wrong shape, are refused by component, layer and head."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import attached, policy_for, tokens
from torch import Tensor

from learnkv import Policy, generate, load_policy, prefill, save_policy
from learnkv.allocators import AdaKV, LayerByLayer, Uniform
from learnkv.core import finite
from learnkv.core.finite import Invalid, refuse_invalid, without_nan
from learnkv.errors import UserError
from learnkv.evaluation.sharing import for_one_prompt
from learnkv.inference.models import describe_model
from learnkv.scorers import Knorm


class Poisoned(Knorm):
    """Norms of the keys, with one number replaced in one layer, row 1, head 1."""

    def __init__(self, number: float = torch.nan, layer: int = 1) -> None:
        super().__init__()
        self.number, self.layer = number, layer

    def forward(self, obs: Any) -> Tensor:
        scores = super().forward(obs)
        if obs.layer_idx == self.layer:
            scores = scores.clone()
            scores[1, 1, 9] = self.number
        return scores


class Refined(Knorm):
    """Scores that are not numbers once the budgets are known."""

    def refine(self, obs: Any, scores: Tensor, budgets: Tensor) -> Tensor:
        return scores * torch.nan if obs.layer_idx == 2 else scores


class PoisonedBudgets(Uniform):
    """Budgets of which one is not a number."""

    static = False

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        wanted = super().forward(scores, features, budget).clone()
        wanted[2, 0, 1] = torch.nan
        return wanted


class OneNumberPerEntry(Knorm):
    """Scores without heads."""

    def forward(self, obs: Any) -> Tensor:
        return super().forward(obs)[:, 0]


class OneNumberPerLayer(Uniform):
    """Budgets of layers instead of heads."""

    static = False

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        return super().forward(scores, features, budget)[..., 0]


class Listed(Knorm):
    """Scores that are no tensor."""

    def forward(self, obs: Any) -> Any:
        return super().forward(obs).tolist()


class Complex(Knorm):
    """Scores that have no order."""

    def forward(self, obs: Any) -> Tensor:
        return torch.complex(super().forward(obs), super().forward(obs))


class WritesKeys(Knorm):
    """Scores whose computation destroys the keys of the cache."""

    def forward(self, obs: Any) -> Tensor:
        return -obs.keys.mul_(2).norm(dim=-1)


class InfiniteBudgets(Uniform):
    """Budgets of which one is infinite."""

    static = False

    def forward(self, scores: Tensor, features: Tensor | None, budget: Tensor) -> Tensor:
        wanted = super().forward(scores, features, budget).clone()
        wanted[2, 0, 1] = torch.inf
        return wanted


SCORES = r"^Poisoned: scores are not finite numbers in layer 1, head 1 \(row 1\)$"
CASES = [
    (lambda: Policy(Poisoned()), SCORES),
    (lambda: Policy(Poisoned(), AdaKV()), SCORES),
    (lambda: Policy(Poisoned(torch.inf), AdaKV()), SCORES),
    (lambda: Policy(Poisoned(-torch.inf), LayerByLayer(Uniform(), AdaKV())), SCORES),
    (lambda: Policy(Refined()), r"^Refined: scores are not finite numbers in layer 2, head 0 \(row 0\)"),
    (
        lambda: Policy(Knorm(), PoisonedBudgets()),
        r"^PoisonedBudgets: budgets are not finite .* layer 2, head 1 \(row 0\)",
    ),
    (
        lambda: Policy(Knorm(), InfiniteBudgets()),
        r"^InfiniteBudgets: budgets are not finite .* layer 2, head 1 \(row 0\)",
    ),
    (lambda: Policy(Listed()), r"^Listed: scores of layer 0: got list, expected a tensor \[B, H, S\]$"),
    (lambda: Policy(Complex()), r"^Complex: scores of layer 0: got torch.complex64 .* expected real numbers"),
    (lambda: Policy(WritesKeys()), r"^WritesKeys writes into the queries, keys or values of layer 0$"),
    (
        lambda: Policy(OneNumberPerEntry()),
        r"^OneNumberPerEntry: scores of layer 0: got shape \[2, 30\], expected \[B, H, S\] = \[2, 2, 30\]$",
    ),
    (
        lambda: Policy(Knorm(), OneNumberPerLayer()),
        r"^OneNumberPerLayer: budgets: got shape \[3, 2\], expected \[L, B, H\] = \[3, 2, 2\]$",
    ),
]


@pytest.mark.parametrize(("make", "line"), CASES)
@pytest.mark.parametrize("way", ["compress", "relax", "one-shot", "shared"])
def test_they_are_refused_where_they_appear(make: Any, line: Any, way: Any) -> None:
    policy, model = make(), attached("llama")

    def plan() -> None:
        if way == "one-shot":
            prefill(model, tokens(2, 30), policy=policy, keep=0.4)
            return
        cache = prefill(model, tokens(2, 30), policies=[policy])
        planned = for_one_prompt(policy) if way == "shared" else policy
        (planned.relax if way == "relax" else planned.compress)(cache, keep=0.4)

    with pytest.raises(UserError, match=line):
        plan()


def test_scores_of_padding_may_be_anything() -> None:
    class Padding(Knorm):
        def forward(self, obs: Any) -> Tensor:
            return super().forward(obs).masked_fill(~obs.valid, torch.nan)

    ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    caches = [Policy(s).compress(prefill(attached("llama"), ids, mask), keep=0.4) for s in (Padding(), Knorm())]
    for layer in range(3):
        assert torch.equal(*(cache.kept_positions(layer, 0, 1) for cache in caches))


def test_decoded_tokens_are_checked_too() -> None:
    policy = Policy(Knorm(), evict_interval=4, decode=Poisoned())
    cache = policy.compress(prefill(attached("llama"), tokens(2, 30)), keep=0.4)
    with pytest.raises(UserError, match=r"^Poisoned: scores are not finite"):
        generate(attached("llama"), tokens(2, 3), cache, max_new_tokens=9)


@pytest.fixture
def deferred(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: nothing is raised at once."""

    monkeypatch.setattr(finite, "READ_AT_ONCE", set())


@pytest.mark.parametrize("make", [make for make, line in CASES if line == SCORES])
def test_on_a_gpu_they_are_refused_at_the_next_host_sync(make: Any, deferred: Any) -> None:
    model = attached("llama")
    for use in (
        lambda cache: cache.spent,
        lambda cache: generate(model, tokens(2, 3), cache, max_new_tokens=2),
        lambda cache: generate(model, tokens(2, 3), cache.fork(), max_new_tokens=2, num_beams=2),
        lambda cache: cache.kept_positions(0, 0, 0),
    ):
        for cache in (
            make().compress(prefill(model, tokens(2, 30)), keep=0.4),
            prefill(model, tokens(2, 30), policy=make(), keep=0.4),
        ):
            with pytest.raises(UserError, match=SCORES):
                use(cache)
    with pytest.raises(UserError, match=SCORES):
        assert make().relax(prefill(model, tokens(2, 30)), keep=0.4).spent


def test_one_host_sync_for_all_checks_of_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    found, syncs = [Invalid(torch.zeros(2, 1, 2, dtype=torch.bool), "x", 0)] * 3, []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: syncs.append(1) or tolist(self))
    refuse_invalid(found)
    assert len(syncs) == 1
    assert without_nan(torch.full((1, 1, 1), torch.nan, device="meta"), "x", []).is_meta


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_weights_that_are_not_numbers_are_refused_at_load(number: Any, tmp_path: Path) -> None:
    policy, model = copy.deepcopy(policy_for("conditioned", attached("llama"))), attached("llama")
    _key, weight = next(iter(policy.state_dict().items()))
    weight.view(-1)[-1] = number
    folder = save_policy(policy, tmp_path, model=describe_model(model), budgets={0.1: [[0.1] * 2] * 3})
    with pytest.raises(UserError, match=r"weight .* has numbers that are not finite"):
        load_policy(folder)


def test_a_cache_is_looked_at_once(deferred: None) -> None:
    cache = Policy(Knorm()).compress(prefill(attached("llama"), tokens(2, 30)), keep=0.4)
    assert cache.invalid
    assert len(cache.spent) == 2
    assert not cache.invalid
