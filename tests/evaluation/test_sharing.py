"""A prompt is scored once for all budgets, and what is kept is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import Loaded
from torch import Tensor

from learnkv import continuation
from learnkv.allocators import CAKE
from learnkv.core.observation import Observation
from learnkv.evaluation import runner
from learnkv.evaluation.batches import Packing
from learnkv.evaluation.config import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.evaluation.sharing import for_one_prompt
from learnkv.evaluation.store import Store
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.text import Text
from learnkv.inference.prefill import prefill
from learnkv.persistence.policies import load_policy
from learnkv.policy.policy import Policy
from learnkv.scorers import Knorm, Scorer, SnapKV

KEEPS = [Budget(keep=0.5), Budget(keep=0.25), Budget(tokens=8)]


@pytest.mark.parametrize("name", ["adakv", "cake", "criticalkv", "defensivekv", "kvzip", "restkv", "vase"])
def test_sharing_scores_between_budgets_changes_nothing_that_is_kept(loaded: Loaded, name: str) -> None:
    model, _ = loaded
    policy = load_policy(name)
    ids = torch.randint(2, 400, (2, 96), generator=torch.Generator().manual_seed(3))
    cache = prefill(model, ids, policies=[policy])
    shared = for_one_prompt(policy)
    for keep in (0.5, 0.25, 0.1):
        one, other = (each.compress(cache.fork(), keep=keep) for each in (shared, policy))
        assert torch.equal(one.budgets, other.budgets)
        for at in range(len(one.compressible)):
            rows = [(row, head) for row in range(2) for head in range(model.config.num_key_value_heads)]
            assert all(torch.equal(one.kept_positions(at, *r), other.kept_positions(at, *r)) for r in rows)


class Counting(Scorer):
    """Knorm, with the layers that it scored and whether it knew the budget."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def forward(self, obs: Observation) -> Tensor:
        self.calls.append((obs.layer_idx, obs.keep is not None))
        return Knorm()(obs)


@pytest.mark.parametrize("reads_budget", [False, True])
def test_a_layer_is_scored_once_for_all_budgets_unless_scores_depend_on_them(
    loaded: Loaded, tmp_path: Path, reads_budget: bool
) -> None:
    scorer = Counting()
    scorer.reads_budget = reads_budget
    ids = list(range(2, 42))
    prompts = [Prompt("text", 40, "query_agnostic", 0, ids[:30], ids[30:])]
    jobs = jobs_of(loaded[0], {"counting": Policy(scorer)}, KEEPS)
    runner.run(loaded[0], [Text(prompts)], jobs, Store(tmp_path / "samples.jsonl"), Packing(4))
    layers = range(loaded[0].config.num_hidden_layers)
    assert scorer.calls == [(layer, reads_budget) for _ in (KEEPS if reads_budget else [0]) for layer in layers]


@pytest.mark.parametrize("name", ["defensivekv", "layer_defensivekv", "restkv"])
def test_what_does_not_depend_on_the_budget_is_computed_once(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    policy = load_policy(name)
    prepared = []
    once = policy.scorer.prepare
    monkeypatch.setattr(policy.scorer, "prepare", lambda obs: prepared.append(obs.layer_idx) or once(obs))
    ids = list(range(2, 42))
    prompts = [Prompt("text", 40, "query_agnostic", 0, ids[:30], ids[30:])]
    jobs = jobs_of(loaded[0], {name: policy}, KEEPS)
    runner.run(loaded[0], [Text(prompts)], jobs, Store(tmp_path / "samples.jsonl"), Packing(4))
    assert prepared == list(range(loaded[0].config.num_hidden_layers))


def test_features_are_computed_anew_when_tokens_were_added(
    loaded: Loaded,
) -> None:
    """While nothing has been evicted each online eviction splits the budget by the features of that moment."""
    model, _ = loaded
    policy = Policy(SnapKV(window=8), CAKE(window=8), evict_interval=8)
    ids = torch.randint(2, 400, (1, 40), generator=torch.Generator().manual_seed(3))
    more = torch.randint(2, 400, (1, 24), generator=torch.Generator().manual_seed(4))
    cache, kept = prefill(model, ids, policies=[policy]), []
    for each in (for_one_prompt(policy), policy):
        small = each.compress(cache.fork(), budget=45)
        with torch.no_grad():
            for part in more.split(4, 1):
                continuation(model, part, small)
        kept.append(small.budgets)
    assert torch.equal(*kept)
