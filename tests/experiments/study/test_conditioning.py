"""Features that are not a prompt's own: whose they are, and what of the kept set they change."""

import pytest
import torch
from support.models import attached, tokens
from support.observations import randomised
from torch import Tensor

from experiments.study import conditioning
from learnkv import Policy, prefill
from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.evaluation.tasks.base import Prompt
from learnkv.scorers import SnapKV


@pytest.fixture(scope="module")
def policy() -> Policy:
    allocator = LearnedAllocator(Uniform(), 3, 2, conditioned=True)
    return Policy(SnapKV(window=16), randomised(allocator))


def prompts_of(ids: Tensor) -> list[Prompt]:
    return [Prompt("vt", 64, "query_agnostic", at, row.tolist(), [1]) for at, row in enumerate(ids)]


def test_each_prompt_gets_the_budgets_of_another(policy: Policy) -> None:
    """Two prompts of one length: as if they had changed places, and budgets come from nothing but features."""
    model, ids = attached("llama"), tokens(2, 64)
    cache, swapped = (prefill(model, prompts, policies=[policy]) for prompts in (ids, ids.flip(0)))
    features = conditioning.features_of(model, policy, prompts_of(ids))
    assert features.shape == (2, 3, 2, 3)
    with torch.no_grad():
        own, same, strange, mean = (
            one.plan(cache, keep=0.25)
            for one in (
                policy,
                conditioning.shuffled(policy, features),
                conditioning.shuffled(policy, features.flip(0)),
                conditioning.shuffled(policy, features.mean(0, keepdim=True)),
            )
        )
        other = policy.plan(swapped, keep=0.25)
    assert torch.equal(own.budgets, same.budgets)
    assert not torch.equal(own.budgets, strange.budgets)
    assert torch.equal(strange.budgets, other.budgets)
    assert torch.equal(mean.budgets[:, 0], mean.budgets[:, 1])
    assert torch.equal(own.scores, strange.scores)
    assert strange.budgets.sum() == own.budgets.sum()


def test_what_own_features_change_is_counted_by_prompt(policy: Policy) -> None:
    model, ids = attached("llama"), tokens(3, 64)
    prompts = prompts_of(ids)
    mean = conditioning.features_of(model, policy, prompts).mean(0, keepdim=True)
    found = conditioning.changes(model, policy, prompts, (0.5, 0.25))
    cache = prefill(model, ids, policies=[policy])
    ours, theirs = (one.compress(cache.fork(), keep=0.25) for one in (policy, conditioning.shuffled(policy, mean)))
    for row in range(3):
        kept, plain = (
            {
                (at, head, one)
                for at in range(3)
                for head in range(2)
                for one in held.kept_positions(at, row, head).tolist()
            }
            for held in (ours, theirs)
        )
        assert found["0.25"][row] == pytest.approx(len(kept - plain) / len(kept))
    assert max(found["0.25"]) > 0.02
    assert len(found["0.5"]) == 3


def test_the_digest_of_strange_features_is_another_one(policy: Policy) -> None:
    """Samples of both are stored side by side, and none is taken for the other."""
    one, other = (conditioning.shuffled(policy, torch.full((2, 3, 2, 3), value)) for value in (0.0, 0.5))
    assert one.spec() != policy.spec()
    assert not all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert conditioning.conditioned(policy)
    assert not conditioning.conditioned(Policy(SnapKV(), LearnedAllocator(Uniform(), 3, 2)))
    assert not conditioning.conditioned(Policy(SnapKV()))
