"""Cached per-token features instead of hidden states, with the gradients of a sample."""

import copy
import dataclasses
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import components
from support.models import attached, padded, tokens
from support.observations import observe, randomised
from support.tables import made_up
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, prefill
from learnkv.core.observation import CaptureSpec, HiddenSample, Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.scorers import Constant, FastKVzip, GateScorer, HiddenScorer, LearnedScorer, Scorer, SnapKV
from learnkv.scorers.residual import Residual

MAKE = {
    "projection": lambda: LearnedScorer(SnapKV(window=8), 3, 2, 16, width=4, window=8, rank=3, hidden_size=48),
    "network": lambda: HiddenScorer(Constant(), 3, 2, 16, 48, width=4, reads=("hidden", "keys")),
    "gate": lambda: GateScorer(SnapKV(window=8), 3, 2, 48, num_groups=2, rank=3, sinks=2),
}
every_scorer = pytest.mark.parametrize("name", MAKE)


def learned(name: str) -> Residual:
    return randomised(MAKE[name]()).requires_grad_(True)


def read(policy: Policy, chunk_size: int | None = None, sample: HiddenSample | None = None) -> CompressedCache:
    prompts = padded([tokens(1, 70)[0], tokens(1, 45)[0]])
    return prefill(attached("llama"), *prompts, policies=[policy], chunk_size=chunk_size, sample=sample)


def gradients(policy: Policy, cache: CompressedCache) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Scores, and what a function of them has for gradients."""
    scores = policy.plan(cache, keep=0.2).raw_scores
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    value = (scores.masked_fill(~scores.isfinite(), 0.0) * weight).sum()
    value.backward()
    found = {path: one.grad.clone() for path, one in policy.named_parameters() if one.grad is not None}
    policy.zero_grad()
    return scores.detach(), found


@pytest.mark.parametrize("parts", [[60], [1] * 60, [7, 20, 20, 13], [30, 30]])
def test_a_sample_does_not_depend_on_chunks(parts: list[int]) -> None:
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


def test_every_slot_is_as_likely_in_a_sample_as_any_other() -> None:
    drawn = torch.stack([HiddenSample(16, seed).slots(64) for seed in range(2000)])
    assert (drawn.diff(dim=-1) > 0).all()
    often = drawn.flatten().bincount(minlength=64) / 2000
    assert (often - 16 / 64).abs().max() < 5 * (0.25 * 0.75 / 2000) ** 0.5
    for other in (4, 6, 40):
        pairs = (drawn == 5).any(-1).double() @ (drawn == other).any(-1).double() / 2000
        assert pairs == pytest.approx(16 / 64 * 15 / 63, abs=5 * (0.06 / 2000) ** 0.5)
    assert HiddenSample(16).slots(9).tolist() == list(range(9))


@every_scorer
def test_gradients_of_a_sample_are_those_of_all_tokens_on_average(name: str) -> None:
    policy = Policy(learned(name))
    scores, whole = gradients(policy, read(policy))
    found = []
    for seed in range(120):
        again, some = gradients(policy, read(policy, sample=HiddenSample(20, seed)))
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
    for path, one in gradients(policy, read(policy, chunk_size=16, sample=HiddenSample(70)))[1].items():
        torch.testing.assert_close(one, whole[path], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [LearnedScorer, HiddenScorer, GateScorer])
def test_a_sample_of_all_tokens_has_the_gradients_of_the_figures_themselves(cls: type[Any]) -> None:
    scorer = components.build(cls, 2, 2, 3, 16).requires_grad_(True)
    with torch.no_grad():
        obs = observe([60], statistics=scorer.capture_spec.statistics, sample=HiddenSample(60))
    assert len(obs.statistics) == 2
    scores = [scorer(one) for one in (obs, dataclasses.replace(obs, statistics={}, sample=None))]
    assert torch.equal(*scores)
    weight = torch.randn(scores[0].shape, generator=torch.Generator().manual_seed(1))
    grads = [torch.autograd.grad((one * weight).sum(), list(scorer.parameters())) for one in scores]
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@every_scorer
def test_hidden_states_are_held_of_the_sample_and_of_no_other_token(name: str) -> None:
    policy, sample = Policy(learned(name)), HiddenSample(20)
    for trained in (True, False):
        cache = read(policy.requires_grad_(trained), chunk_size=16, sample=sample)
        for layer in cache.compressed_layers():
            held = layer.capture.statistics
            assert layer.capture.hidden is None
            assert (sample in held) == trained
            assert all(one.shape[-1] <= 4 for which, one in held.items() if which != sample)
            assert not trained or held[sample].shape == (2, 20, 48)


@every_scorer
def test_chunks_and_copies_score_alike(name: str) -> None:
    policy = Policy(randomised(MAKE[name]()))
    twin = copy.deepcopy(policy)
    want = policy.plan(read(policy), keep=0.2).raw_scores
    torch.testing.assert_close(policy.plan(read(policy, 11), keep=0.2).raw_scores, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(twin.plan(read(twin), keep=0.2).raw_scores, want)
    for weight in twin.parameters():
        weight.data *= 2
    assert not torch.equal(twin.plan(read(twin), keep=0.2).raw_scores, want)


def test_figures_that_are_the_same_are_gathered_once(tmp_path: Path) -> None:
    gate, file = made_up("gate", 3, 2, 2, 16, 48), tmp_path / "gate.safetensors"
    shutil.copy(gate, file)
    assert Policy(FastKVzip(str(file))).capture_spec == Policy(FastKVzip(gate)).capture_spec
    tensors.write(file, {name: 2 * one for name, one in tensors.read(gate, tensors.KVZIP_GATE).items()})
    both, twice = Policy(FastKVzip(gate)).capture_spec, Policy(FastKVzip(gate, bias="twice")).capture_spec
    assert (both | Policy(FastKVzip(gate)).capture_spec) == both
    assert len((both | twice | Policy(FastKVzip(str(file))).capture_spec).statistics) == 3


@every_scorer
@pytest.mark.parametrize("evict_interval", [0, 6])
def test_copies_of_a_cache_and_of_a_policy_are_served(name: str, evict_interval: int) -> None:
    policy = Policy(randomised(MAKE[name]()), evict_interval=evict_interval)
    cache, said = read(policy), tokens(2, 9, seed=3)
    assert all(one.compute.__self__ is policy.scorer for one in copy.deepcopy(policy.scorer.decode_capture))
    for copied in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(policy.plan(copied, keep=0.2).raw_scores, policy.plan(cache, keep=0.2).raw_scores)
    small = policy.compress(cache.fork(), keep=0.2)
    twin = copy.deepcopy(small)
    with torch.no_grad():
        logits = [continuation(attached("llama"), said, one) for one in (small, twin)]
    assert torch.equal(*logits)
    other = copy.deepcopy(policy)
    assert torch.equal(other.plan(cache, keep=0.2).raw_scores, policy.plan(cache, keep=0.2).raw_scores)
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    with pytest.raises(UserError, match="hand it to prefill"):
        other.plan(cache, keep=0.2)
    policy.plan(cache, keep=0.2)


@every_scorer
def test_a_prompt_that_was_read_with_other_weights_is_refused(name: str) -> None:
    policy = Policy(learned(name), evict_interval=6)
    cache = read(policy)
    compressed = policy.compress(cache.fork(), keep=0.3)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.mul_(2)
        with pytest.raises(UserError, match="its weights have changed since"):
            policy.plan(cache, keep=0.2)
        with pytest.raises(UserError, match="its weights have changed since"):
            continuation(attached("llama"), tokens(2, 9), compressed)


@every_scorer
def test_a_prompt_without_a_sample_is_refused_where_gradients_are_needed(name: str) -> None:
    policy = Policy(learned(name).requires_grad_(False))
    cache = read(policy)
    policy.requires_grad_(True)
    with pytest.raises(UserError, match="is trained, and was not when the prompt was read"):
        policy.plan(cache, keep=0.2)
    with torch.no_grad():
        policy.plan(cache, keep=0.2)
    policy.plan(read(policy), keep=0.2)


class Mean(Scorer):
    """Of several."""

    def __init__(self, several: list[Residual]) -> None:
        super().__init__()
        self.several = torch.nn.ModuleList(several)
        self.window = max(one.window for one in several)

    def forward(self, obs: Observation) -> Tensor:
        return torch.stack([one(obs) for one in self.several]).mean(0)


def test_scorers_within_a_container_have_gradients() -> None:
    policy = Policy(Mean([learned(name) for name in MAKE]))
    _, found = gradients(policy, read(policy))
    assert found.keys() == {path for path, _ in policy.named_parameters()}
    assert all(one.abs().max() > 0 for one in found.values())


@every_scorer
def test_gradients_are_not_counted_twice_where_the_prompt_is_read_with_them(name: str) -> None:
    model, policy = attached("llama"), Policy(learned(name))
    sample = HiddenSample(20, 4)
    want = gradients(policy, prefill(model, tokens(1, 70), policies=[policy], sample=sample))[1]
    cache = CompressedCache(model.config, policy.capture_spec.with_sample(sample))
    cache.set_prompt([70])
    model(input_ids=tokens(1, 70), past_key_values=cache, use_cache=True)
    for path, one in gradients(policy, cache)[1].items():
        torch.testing.assert_close(one, want[path], rtol=1e-4, atol=1e-4)


def test_a_sample_is_captured_for_trained_scorers_only() -> None:
    spec = Policy(learned("gate")).capture_spec
    assert spec.sample == HiddenSample()
    assert spec.with_sample(HiddenSample(20, 1)).gathered == spec.statistics | {HiddenSample(20, 1)}
    assert spec.with_sample(None) == spec | CaptureSpec() == spec
    assert Policy(SnapKV()).capture_spec.with_sample(HiddenSample()).sample is None


def test_keys_and_values_are_read_from_the_cache() -> None:
    scorer = randomised(HiddenScorer(Constant(), 3, 2, 16, 48, reads=("keys", "values"))).requires_grad_(True)
    assert not Policy(scorer).capture_spec.statistics
    assert Policy(scorer, evict_interval=4).capture_spec.statistics
    found = []
    for policy, cache in (
        (Policy(scorer), prefill(attached("llama"), tokens(1, 50))),
        (
            Policy(scorer, evict_interval=4),
            prefill(attached("llama"), tokens(1, 50), policies=[Policy(scorer, evict_interval=4)]),
        ),
    ):
        found.append(gradients(policy, cache)[1]["scorer.weight_in"])
    assert torch.equal(*found)
    assert found[0].abs().max() > 0


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use() -> None:
    policy = Policy(learned("projection"))
    sample = HiddenSample(20, seed=123)
    with torch.inference_mode():
        read(policy, sample=sample)
    gradients(policy, read(policy, sample=sample))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: HiddenSample(0), r"^gradient_tokens=0: expected at least 1"),
        (lambda: GateScorer(SnapKV(), 3, 2, 48), r"^num_groups=0: expected the query heads per kv head"),
        (lambda: HiddenScorer(SnapKV(), activation="relu"), r"^activation=relu: expected gelu or silu"),
    ],
)
def test_what_cannot_be_is_named(make: Callable[..., Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        make()
