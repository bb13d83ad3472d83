"""What scorers make of single tokens: held instead of hidden states, with the gradients of a sample."""

import copy
import dataclasses

import pytest
import torch
from models import attached, padded, tokens
from observations import observe, randomised
from tables import made_up

from learnkv import Policy, prefill
from learnkv.scorers import Constant, FastKVzip, GateScorer, HiddenScorer, LearnedScorer, SnapKV
from learnkv.scorers.tokenwise import HiddenSample, draw_sample

MAKE = {
    "projection": lambda: LearnedScorer(SnapKV(window=8), 3, 2, 16, width=4, window=8, rank=3, hidden_size=48),
    "network": lambda: HiddenScorer(Constant(), 3, 2, 16, 48, width=4, reads=("hidden", "keys")),
    "gate": lambda: GateScorer(SnapKV(window=8), 3, 2, 48, num_groups=2, rank=3, sinks=2),
}
every_scorer = pytest.mark.parametrize("name", MAKE)


def learned(name: str):
    return randomised(MAKE[name]()).requires_grad_(True)


def read(policy: Policy, chunk_size: int | None = None):
    prompts = padded([tokens(1, 70)[0], tokens(1, 45)[0]])
    return prefill(attached("llama"), *prompts, policies=[policy], chunk_size=chunk_size)


def gradients(policy: Policy, cache) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores, and what a function of them has for gradients."""
    scores = policy.plan(cache, keep=0.2).judged
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    value = (scores.masked_fill(~scores.isfinite(), 0.0) * weight).sum()
    value.backward()
    found = {path: one.grad.clone() for path, one in policy.named_parameters() if one.grad is not None}
    policy.zero_grad()
    return scores.detach(), found


@pytest.mark.parametrize("parts", [[60], [1] * 60, [7, 20, 20, 13], [30, 30]])
def test_a_sample_does_not_depend_on_chunks(parts):
    sample, held, end = HiddenSample(16, seed=3), None, 0
    whole = observe([60])
    for part in parts:
        end += part
        read = {name: getattr(whole, name)[:, :, :end] for name in ("keys", "values", "valid", "positions")}
        queries = torch.zeros(1, 6, part, 16)
        chunk = dataclasses.replace(whole, hidden=whole.hidden[:, end - part : end], queries=queries, **read)
        held = sample.update(chunk, held)
        assert held.shape == (1, min(end, 16), 32)
    assert torch.equal(held, whole.hidden[:, sample.slots(60)])


def test_every_slot_is_as_likely_in_a_sample_as_any_other():
    drawn = torch.stack([HiddenSample(16, seed).slots(64) for seed in range(2000)])
    assert (drawn.diff(dim=-1) > 0).all()
    often = drawn.flatten().bincount(minlength=64) / 2000
    assert (often - 16 / 64).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    pairs = (drawn == 5).any(-1).double() @ (drawn == 40).any(-1).double() / 2000
    assert pairs == pytest.approx(16 / 64 * 15 / 63, abs=5 * (0.06 / 2000) ** 0.5)
    assert HiddenSample(16).slots(9).tolist() == list(range(9))


@every_scorer
def test_gradients_of_a_sample_are_those_of_all_tokens_on_average(name):
    policy = Policy(learned(name))
    scores, whole = gradients(policy, read(policy))
    found = []
    for seed in range(120):
        draw_sample(policy, 20, seed)
        again, some = gradients(policy, read(policy))
        assert torch.equal(again, scores)
        found.append(some)
    reads_tokens = {"projection": {"scorer.project"}}.get(name, whole.keys())
    for path, want in whole.items():
        drawn = torch.stack([one[path] for one in found])
        if path not in reads_tokens:
            torch.testing.assert_close(drawn, want.expand_as(drawn), rtol=1e-4, atol=1e-5)
            continue
        error = drawn.std(0) / len(found) ** 0.5
        assert error.max() > 0
        away = ((drawn.mean(0) - want) / error.clamp_min(1e-6 * want.abs().max())).square().mean().sqrt()
        assert away < 1.3, path  # standard errors; it is 1 on average
    draw_sample(policy, 70, 0)
    for path, one in gradients(policy, read(policy, chunk_size=16))[1].items():
        torch.testing.assert_close(one, whole[path], rtol=1e-3, atol=1e-4)


@every_scorer
def test_hidden_states_are_held_of_the_sample_and_of_no_other_token(name):
    policy = Policy(learned(name))
    draw_sample(policy, 20, 0)
    for trained in (True, False):
        cache = read(policy.requires_grad_(trained), chunk_size=16)
        for layer in cache.compressed_layers():
            held = layer.recorder.statistics
            assert layer.recorder.hidden is None
            assert (policy.scorer.sample in held) == trained
            assert all(one.shape[-1] <= 4 for which, one in held.items() if which != policy.scorer.sample)
            assert not trained or held[policy.scorer.sample].shape == (2, 20, 48)


@every_scorer
def test_chunks_and_copies_judge_alike(name):
    policy = Policy(randomised(MAKE[name]()))
    twin = copy.deepcopy(policy)
    want = policy.plan(read(policy), keep=0.2).judged
    torch.testing.assert_close(policy.plan(read(policy, 11), keep=0.2).judged, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(twin.plan(read(twin), keep=0.2).judged, want)
    for weight in twin.parameters():
        weight.data *= 2
    assert not torch.equal(twin.plan(read(twin), keep=0.2).judged, want)


def test_figures_that_are_the_same_are_gathered_once():
    gate, other = made_up("gate", 3, 2, 2, 16, 48), made_up("gate", 3, 2, 2, 8, 48)
    both, twice = Policy(FastKVzip(gate)).recording, Policy(FastKVzip(gate, bias="twice")).recording
    assert (both | Policy(FastKVzip(gate)).recording) == both
    assert len((both | twice | Policy(FastKVzip(other)).recording).statistics) == 3
