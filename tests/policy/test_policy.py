"""What policies spend, protect and learn from."""

import functools
import math
from typing import Any

import pytest
import torch
from support import models
from support.models import (
    HEURISTICS,
    LEARNED,
    assert_logits_close,
    attached,
    kept,
    padded,
    policy_for,
    tokens,
)
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, load_policy, prefill
from learnkv.allocators import LearnedAllocator, LearnedSequentialAllocator, Uniform
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.states import Relaxed
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.softmax_terms import SoftmaxTerms
from learnkv.scorers import Scorer, SnapKV

every_policy = pytest.mark.parametrize("name", HEURISTICS + LEARNED)
LAYERS, HEADS = 3, 2  # of the tiny Llama
LENGTHS = [1, 2, 3, 11, 31, 32, 33, 150]


def read(*lengths: int, seed: int = 0) -> CompressedCache:
    """A cache of left-padded prompts of these lengths."""
    with torch.no_grad():
        return models.read(attached("llama"), *padded([tokens(1, length, seed=seed)[0] for length in lengths]))


read_once = functools.cache(read)
"""For forks: heuristics and untrained policies find everything in it."""


@every_policy
def test_every_policy_spends_exactly_the_budget_at_any_length(name: str) -> None:
    policy, heads = policy_for(name, attached("llama")), LAYERS * HEADS
    for length, whole in zip(LENGTHS, map(read_once, LENGTHS), strict=True):
        for keep in (0.02, 0.1, 0.331, 0.6, 0.999):
            total = round(keep * length * heads)
            if total < heads:
                with pytest.raises(UserError, match=rf"^keep={keep:g}: leaves .* of a prompt of {length} tokens"):
                    policy.compress(whole.fork(), keep=keep)
                continue
            small = policy.compress(whole.fork(), keep=keep)
            assert int(small.budgets.sum()) == total
            assert small.spent == [total / (length * heads)]
            assert sum(map(len, kept(small, 0))) == total
            protected = min(12, total // heads // 2)
            assert protected <= int(small.budgets.min()) <= int(small.budgets.max()) <= length


@every_policy
def test_rows_spend_their_own_budgets(name: str) -> None:
    small = policy_for(name, attached("llama")).compress(read_once(90, 41, 20).fork(), keep=0.15)
    assert small.budgets.sum((0, 2)).tolist() == [round(0.15 * n * 6) for n in (90, 41, 20)]


@every_policy
def test_a_budget_in_tokens_is_an_average_over_the_heads(name: str) -> None:
    whole, policy = read_once(90, 20), policy_for(name, attached("llama"))
    for budget in (1, 7, 12.5, 20, 33, 90, 500):
        small = policy.compress(whole.fork(), budget=budget)
        assert small.budgets.sum((0, 2)).tolist() == [round(6 * min(budget, n)) for n in (90, 20)]


class Middle(Scorer):
    """The nearer to the prompt's middle, the better: nothing that is protected would be kept for its score."""

    def forward(self, obs: Observation) -> Tensor:
        length = obs.valid.sum(-1, keepdim=True)
        return -(obs.positions - length // 2).abs().float()


@pytest.mark.parametrize(
    ("keep", "sinks", "recent"),
    [(0.5, 3, 5), (0.35, 2, 5), (0.25, 0, 5), (0.2, 0, 4), (0.1, 0, 2), (0.05, 0, 1), (0.025, 0, 0)],
)
def test_sinks_and_recent_tokens_are_protected_up_to_half_of_the_budget_recent_first(
    keep: float, sinks: int, recent: int
) -> None:
    small = Policy(Middle(), sinks=3, recent=5).compress(read(40), keep=keep)
    middle = sorted(range(40), key=lambda position: (abs(position - 20), position))
    expected = {*range(sinks), *range(40 - recent, 40)}
    expected |= set([position for position in middle if position not in expected][: round(keep * 40) - len(expected)])
    assert kept(small, 0) == [sorted(expected)] * LAYERS * HEADS


@pytest.mark.parametrize(("sinks", "recent"), [(2, 0), (0, 3), (0, 0)])
def test_each_protection_is_optional(sinks: int, recent: int) -> None:
    small = Policy(Middle(), sinks=sinks, recent=recent).compress(read(40), keep=0.25)
    rest = range(20 - (10 - sinks - recent) // 2, 20 + (11 - sinks - recent) // 2)
    for head in kept(small, 0):
        assert {*range(sinks), *range(40 - recent, 40)} <= set(head)
        assert len(set(head) & set(rest)) >= len(rest) - 1


@pytest.mark.parametrize("name", ["full", *HEURISTICS, *LEARNED])
def test_relaxing_computes_what_compressing_does_and_leaves_the_cache_alone(name: str) -> None:
    policy, whole = policy_for(name, attached("llama")), read_once(70, 33)
    said = tokens(2, 9, seed=1)
    with torch.no_grad():
        relaxed = policy.relax(whole, keep=0.2)
        ours = continuation(attached("llama"), said, relaxed)
        theirs = continuation(attached("llama"), said, policy.compress(whole.fork(), keep=0.2))
        untouched = continuation(attached("llama"), said, load_policy("full").compress(whole.fork(), keep=0.2))
    assert_logits_close(ours, theirs)
    assert (name == "full") == torch.equal(ours, untouched)


def loss(policy: Policy, whole: CompressedCache, **spend: float) -> Tensor:
    relaxed = policy.relax(whole, **spend)
    relaxed.batch_repeat_interleave(2)
    first = continuation(attached("llama"), tokens(4, 3, seed=2), relaxed)
    return first.logsumexp(-1).mean() + continuation(attached("llama"), tokens(4, 2, seed=3), relaxed).square().mean()


@pytest.mark.parametrize("name", LEARNED)
def test_the_gradient_reaches_every_learned_parameter(name: str) -> None:
    policy = policy_for(name, attached("llama")).train().requires_grad_(True)
    loss(policy, read(70, 33), keep=0.2).backward()
    assert [path for path, held in policy.named_parameters() if held.grad is None] == []
    for path, held in policy.named_parameters():
        assert held.grad.isfinite().all(), path
        assert held.grad.abs().max() > 0, path
    policy.requires_grad_(False)


def gated(layer: CompressedLayer, query: Tensor, mask: Tensor | None, scaling: float, terms: SoftmaxTerms) -> Tensor:
    """What `attend` computes, by reading all of the prompt with gates of zero and one."""
    assert isinstance(layer.state, Relaxed)
    assert layer.tail is not None
    hard = torch.zeros_like(layer.state.gates)
    for prompt, positions in enumerate(layer.prompt.slot_positions()):
        for head in range(layer.heads):
            hard[prompt, head] = torch.isin(positions, layer.kept_positions(prompt * layer.state.copies, head)).float()
    straight = hard + layer.state.gates - layer.state.gates.detach()
    return gated_attention(
        query, layer.prompt.keys, layer.prompt.values, straight, layer.tail.arguments(mask), scaling, terms
    )


@pytest.mark.parametrize("name", LEARNED)
def test_the_gradient_is_that_of_gating_every_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, found = policy_for(name, attached("llama")).train().requires_grad_(True), []
    for change in (False, True):
        if change:
            monkeypatch.setattr(CompressedLayer, "attend", gated)
        value = loss(policy, read(70, 33), keep=0.2)
        grads = torch.autograd.grad(value, list(policy.parameters()))
        found.append([value.detach(), *grads])
    policy.requires_grad_(False)
    for ours, told in zip(*found, strict=True):
        torch.testing.assert_close(ours, told, rtol=1e-4, atol=1e-5 * float(told.abs().max()))


def test_what_a_student_holds_for_its_gradient_does_not_grow_with_the_prompt() -> None:
    policy, said, held = policy_for("tokens", attached("llama")).requires_grad_(True), tokens(1, 5), []
    for length in (60, 240):
        student = policy.relax(read(length), budget=10)
        saved: dict[Any, Any] = {}
        prompt = {one.untyped_storage().data_ptr() for one in student.tensors()}

        def note(one: Tensor, saved: dict[int, int] = saved, prompt: set[int] = prompt) -> Tensor:
            if one.untyped_storage().data_ptr() not in prompt:
                saved[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
            return one

        with torch.autograd.graph.saved_tensors_hooks(note, lambda one: one):
            logits = continuation(attached("llama"), said, student)
        held.append(sum(saved.values()))
        del logits
    policy.requires_grad_(False)
    assert held[0] == held[1]


@pytest.mark.parametrize("allocator", [LearnedAllocator, LearnedSequentialAllocator])
def test_a_step_along_the_gradient_of_the_budgets_helps(allocator: type[Any]) -> None:
    """The straight-through gradient need not be exact, but moving budgets along it must lower the deployed loss."""
    model, whole, said = attached("llama"), read(150, seed=5), tokens(1, 12, seed=6)
    with torch.no_grad():
        target = continuation(model, said, whole.fork()).log_softmax(-1)

    def divergence(cache: CompressedCache) -> Tensor:
        ours = continuation(model, said, cache).log_softmax(-1)
        return (target.exp() * (target - ours)).sum(-1).mean()

    policy = Policy(SnapKV(), allocator(Uniform(), LAYERS, HEADS))
    steps = torch.optim.Adam(policy.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        steps.zero_grad()
        divergence(policy.relax(whole, keep=0.2)).backward()
        steps.step()
        with torch.no_grad():
            losses.append(float(divergence(policy.compress(whole.fork(), keep=0.2))))
    assert math.isfinite(losses[-1])
    assert min(losses[-5:]) < 0.9 * losses[0]


def test_a_scorer_is_not_handed_fewer_queries_than_it_asks_for() -> None:
    whole = prefill(attached("llama"), tokens(1, 50), window=8)
    for call in (load_policy("snapkv").compress, load_policy("adakv").relax):
        with pytest.raises(UserError, match=r"^window=8: the policy reads the last 32 queries .* with window=32$"):
            call(whole.fork(), keep=0.5)
    assert Policy(SnapKV(window=8)).compress(whole, keep=0.5).spent == [0.5]
    short = prefill(attached("llama"), tokens(1, 9), window=9)
    assert load_policy("snapkv").compress(short, keep=1 / 3).spent == [1 / 3]


@pytest.mark.parametrize(
    ("spend", "line"),
    [
        ({}, "keep=None budget=None bytes=None: expected exactly one of them"),
        ({"keep": 0.5, "budget": 3}, "keep=0.5 budget=3 bytes=None: expected exactly one of them"),
        ({"keep": 0.0}, "keep=0: expected a fraction .* 0 < keep <= 1"),
        ({"keep": 1.5}, "keep=1.5: expected a fraction"),
        ({"keep": -0.1}, "keep=-0.1: expected a fraction"),
        ({"keep": math.nan}, "keep=nan: expected a fraction"),
        ({"keep": 0.01}, r"keep=0.01: leaves 0.30 entries per head of a prompt of 30 tokens \(row 0\)"),
        ({"budget": 0.5}, "budget=0.5: expected at least one entry per head"),
        ({"budget": math.nan}, "budget=nan: expected at least one entry per head"),
        ({"budget": -3}, "budget=-3: expected at least one entry per head"),
    ],
)
def test_budgets_are_checked(spend: dict[str, int], line: str) -> None:
    policy, whole = load_policy("snapkv"), read(30)
    for call in (
        policy.compress,
        policy.relax,
        lambda _, **spend: prefill(attached("llama"), tokens(1, 30), policy=policy, **spend),
    ):
        with pytest.raises(UserError, match=line):
            call(whole.fork(), **spend)


def test_protected_numbers_are_checked() -> None:
    with pytest.raises(UserError, match="sinks=-1 recent=8: expected numbers of tokens >= 0"):
        Policy(None, sinks=-1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"recent": 1.5}, r"recent=1.5: expected numbers of tokens >= 0"),
        ({"rerotate": "middle"}, r"rerotate='middle': expected start, end or null"),
        ({"evict_interval": 1.5}, r"evict_interval=1.5: expected a number of tokens"),
    ],
)
def test_arguments_that_would_be_read_as_others_are_refused(arguments: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        Policy(SnapKV(), **arguments)


@pytest.mark.parametrize("spend", [{"keep": "0.5"}, {"keep": [0.5]}, {"budget": "5"}])
def test_budgets_that_are_no_numbers_are_one_line(spend: Any) -> None:
    with pytest.raises(UserError, match=r"(keep|budget)=.*: expected a number, got"):
        Policy(SnapKV()).compress(prefill(attached("llama"), tokens(1, 30)), **spend)
