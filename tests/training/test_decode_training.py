"""Students that evict while tokens are added: the deployed sets at every moment, and the gradient of every eviction."""

import math

import pytest
import torch
from support.models import LEARNED, assert_logits_close, attached, kept, padded, policy_for, tokens
from support.observations import randomised
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, prefill
from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.states import Relaxed
from learnkv.ops.gated_attention import gated_attention
from learnkv.ops.softmax_terms import SoftmaxTerms
from learnkv.scorers import H2O, LearnedScorer, SnapKV
from learnkv.training.continuation import continuation_outputs

pytestmark = pytest.mark.compat
EVERY, LAYERS, HEADS = 8, 3, 2
NAMES = [*LEARNED, "decode", "statistics"]


def policy_of(name: str) -> Policy:
    if name == "decode":
        known = policy_for("tokens", attached("llama"))
        return Policy(SnapKV(), known.allocator, evict_interval=EVERY, decode=known.scorer)
    if name == "statistics":
        return Policy(randomised(LearnedScorer(H2O(), LAYERS, HEADS, 16)), evict_interval=EVERY)
    known = policy_for(name, attached("llama"))
    return Policy(known.scorer, known.allocator, known.sinks, known.recent, EVERY)


def read(policy: Policy) -> CompressedCache:
    with torch.no_grad():
        return prefill(attached("llama"), *padded([tokens(1, 70)[0], tokens(1, 45)[0]]), policies=[policy])


def continuations() -> tuple[Tensor, Tensor]:
    """Two of each prompt, of unequal lengths."""
    return padded([tokens(1, length, seed=9)[0] for length in (29, 12, 20, 29)], "right")


def logits_of(policy: Policy, cache: CompressedCache) -> Tensor:
    """Logits of the tokens that are not padding, after each prompt has got two rows."""
    cache.batch_repeat_interleave(2)
    ids, mask = continuations()
    return continuation_outputs(attached("llama"), ids, cache, mask)[0][mask.bool()]


@pytest.mark.parametrize("name", NAMES)
def test_a_student_keeps_and_says_what_is_deployed(name: str) -> None:
    policy = policy_of(name).requires_grad_(True)
    whole = read(policy)
    with torch.no_grad():
        deployed = policy.compress(whole.fork(), keep=0.3)
        theirs = logits_of(policy, deployed)
    student = policy.relax(whole, keep=0.3)
    ours = logits_of(policy, student)
    policy.requires_grad_(False)
    assert_logits_close(ours.detach(), theirs)
    assert student.continuation_length == deployed.continuation_length == 29
    assert student.tail_length == deployed.tail_length == 29 % EVERY
    assert torch.equal(student.budgets, deployed.budgets)
    for layer in range(LAYERS):
        for row in range(4):
            for head in range(HEADS):
                assert torch.equal(student.kept_positions(layer, row, head), deployed.kept_positions(layer, row, head))
    assert any(int(deployed.kept_positions(0, 0, head).max()) >= 70 for head in range(HEADS))
    assert student.schedule.kept == deployed.schedule.kept == deployed.schedule.budget
    assert whole.continuation_length == 0


def straight(layer: CompressedLayer, query: Tensor, mask: Tensor | None, scaling: float, terms: SoftmaxTerms) -> Tensor:
    """What `attend` computes, by reading all entries that could be kept with gates of zero and one."""
    assert isinstance(layer.state, Relaxed)
    assert layer.tail is not None
    if layer.decode_capture is not None:
        layer.capture.hold_back(query, layer.tail.length, None if mask is None else mask[:, 0, -1])
    hard = torch.zeros_like(layer.state.gates)
    for row, positions in enumerate(layer.prompt.entry_positions()):
        for head in range(layer.heads):
            hard[row, head] = torch.isin(positions[head], layer.kept_positions(row * layer.state.copies, head)).float()
    gates = hard + layer.state.gates - layer.state.gates.detach()
    return gated_attention(
        query, layer.prompt.keys, layer.prompt.values, gates, layer.tail.arguments(mask), scaling, terms
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_gating_every_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, found = policy_of(name).requires_grad_(True), []
    whole = read(policy)
    for change in (False, True):
        if change:
            monkeypatch.setattr(CompressedLayer, "attend", straight)
        value = logits_of(policy, policy.relax(whole, keep=0.3)).square().mean()
        found.append([value.detach(), *torch.autograd.grad(value, list(policy.parameters()))])
    policy.requires_grad_(False)
    for ours, told in zip(*found, strict=True):
        assert told.abs().max() > 0
        torch.testing.assert_close(ours, told, rtol=1e-3, atol=1e-4 * float(told.abs().max()))


def test_a_token_trains_the_latest_eviction_before_it() -> None:
    """What scores the prompt has no gradient from tokens after the first renewal, what judges them has none before."""
    policy = policy_of("decode").requires_grad_(True)
    ids, mask = tokens(2, 3 * EVERY, seed=4), torch.ones(2, 3 * EVERY)
    for part, expected in ((slice(0, EVERY), False), (slice(EVERY, None), True)):
        logits = continuation_outputs(attached("llama"), ids, policy.relax(read(policy), keep=0.3), mask)[0]
        grads = torch.autograd.grad(logits[:, part].square().mean(), list(policy.decode.parameters()))
        assert [bool(one.abs().max() > 0) for one in grads] == [expected] * len(grads)
    budgets = policy.allocator.layer_budget.logits
    for part in (slice(0, EVERY), slice(2 * EVERY, None)):  # heads keep what they were given
        logits = continuation_outputs(attached("llama"), ids, policy.relax(read(policy), keep=0.3), mask)[0]
        assert torch.autograd.grad(logits[:, part].square().mean(), budgets)[0].abs().max() > 0
    policy.requires_grad_(False)


def test_steps_along_the_gradient_help_what_is_said_after_evictions() -> None:
    torch.manual_seed(0)  # of the scorer's first weights
    policy = Policy(
        LearnedScorer(SnapKV(), LAYERS, HEADS, 16), LearnedAllocator(Uniform(), LAYERS, HEADS), evict_interval=EVERY
    )
    model, ids, mask = attached("llama"), tokens(2, 5 * EVERY, seed=6), torch.ones(2, 5 * EVERY)
    whole = read(policy)
    with torch.no_grad():
        target = continuation(model, ids, whole.fork()).log_softmax(-1)[:, EVERY:]

    def divergence(cache: CompressedCache) -> Tensor:
        ours = continuation_outputs(model, ids, cache, mask)[0].log_softmax(-1)[:, EVERY:]
        return (target.exp() * (target - ours)).sum(-1).mean()

    steps, losses = torch.optim.Adam(policy.parameters(), lr=0.01), []
    for _ in range(16):
        steps.zero_grad()
        divergence(policy.relax(whole, keep=0.2)).backward()
        steps.step()
        with torch.no_grad():
            losses.append(float(divergence(policy.compress(whole.fork(), keep=0.2))))
    assert math.isfinite(losses[-1])
    assert min(losses[-4:]) < 0.95 * losses[0]


def test_a_student_of_a_policy_that_leaves_later_tokens_alone_reads_at_once() -> None:
    policy = policy_for("tokens", attached("llama"))
    student = policy.relax(read(policy), keep=0.3)
    with torch.no_grad():
        logits_of(policy, student)
    assert (student.schedule, student.tail_length) == (None, 29)
    assert len(kept(student, 0)) == LAYERS * HEADS
