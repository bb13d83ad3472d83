"""What a validation measures, against the deployed cache and against the formula of marginal values."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import train
from transformers import PreTrainedModel

from learnkv.allocators import LearnedAllocator, Uniform
from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generate import continuation
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill
from learnkv.policy.policy import Policy
from learnkv.scorers import LearnedScorer, SnapKV
from learnkv.training.losses import forward_kl
from learnkv.training.validation import VALIDATION_KEEPS, measure

KEEP = 0.25


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_model(str(folder))[0]


def learned(moved: float) -> Policy:
    torch.manual_seed(0)
    scorer = LearnedScorer(SnapKV(window=8), num_layers=2, num_heads=2, head_dim=8, width=4, window=8)
    policy = Policy(scorer, LearnedAllocator(Uniform(), num_layers=2, num_heads=2), sinks=2, recent=4)
    for parameter in policy.parameters():
        parameter.data += moved * torch.randn(parameter.shape)
    return policy


@pytest.fixture
def prompt(model: PreTrainedModel) -> tuple[CompressedCache, Callable[..., Any]]:
    """Two prompts of different length, and the divergence of what is read after a student's cache."""
    ids = torch.randint(3, 100, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    said = torch.randint(3, 100, (2, 8), generator=torch.Generator().manual_seed(1))
    cache = prefill(model, ids, mask, policies=[learned(0.0)])
    full = continuation(model, said, cache.fork()).detach()
    return cache, lambda student: forward_kl(
        full.flatten(0, 1), continuation(model, said, student).flatten(0, 1)
    ).mean()


def test_a_policy_that_has_not_learned_changes_nothing(prompt: tuple[CompressedCache, Callable[..., Any]]) -> None:
    cache, divergence = prompt
    found = measure(learned(0.0), cache, KEEP, 0.5, divergence)
    assert found.changed == 0
    assert found.learned.item() == found.heuristic.item() > 1e-3
    assert abs(found.gap) > 1e-4


def test_the_deployed_sets_are_compared(prompt: tuple[CompressedCache, Callable[..., Any]]) -> None:
    cache, divergence = prompt
    policy = learned(1.0)
    found = measure(policy, cache, KEEP, 0.5, divergence)
    with torch.no_grad():
        ours, theirs = (one.compress(cache.fork(), keep=KEEP) for one in (policy, policy.base_policy()))
        assert found.learned.item() == pytest.approx(divergence(ours.fork()).item(), rel=1e-4)
        assert found.heuristic.item() == pytest.approx(divergence(theirs.fork()).item(), rel=1e-4)
    shares = []
    for row in range(2):
        sets = [
            {
                (at, head, one)
                for at in range(2)
                for head in range(2)
                for one in cache.kept_positions(at, row, head).tolist()
            }
            for cache in (ours, theirs)
        ]
        shares.append(len(sets[0] - sets[1]) / len(sets[0]))
    assert 0.05 < min(shares) < max(shares) < 1
    assert found.changed.item() == pytest.approx(sum(shares) / 2)


def test_without_temperature_gates_are_the_deployed_set(prompt: tuple[CompressedCache, Callable[..., Any]]) -> None:
    """Where budgets are whole numbers, as those of a uniform split at a quarter of 60 and of 48 entries are."""
    cache, divergence = prompt
    policy = learned(0.0)
    policy.scorer.weight_out.data += torch.randn(policy.scorer.weight_out.shape)
    found = measure(policy, cache, KEEP, 1e-4, divergence)
    assert found.gap.item() == pytest.approx(0, abs=0.02 * found.learned.item())
    assert abs(measure(policy, cache, KEEP, 0.5, divergence).gap) > 0.1 * found.learned


def test_marginal_values_are_the_gradient_of_the_count(prompt: tuple[CompressedCache, Callable[..., Any]]) -> None:
    """gbar = sum_j g_j v_j / sum_j v_j with v = m (1 - m), summed over prompts, of the mean over both of them."""
    cache, divergence = prompt
    policy = learned(1.0)
    found = measure(policy, cache, KEEP, 0.5, divergence).marginal
    student = policy.relax(cache, keep=KEEP, temperature=0.5)
    gates = [layer.state.gates for layer in student.compressed_layers()]
    wanted = []
    for gradient, gate in zip(torch.autograd.grad(divergence(student), gates), gates, strict=True):
        slope = gate * (1 - gate)
        wanted.append(-((gradient * slope).sum(-1) / slope.sum(-1)).sum(0))
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-3, atol=1e-7)
    assert found.std() > 0


def test_a_run_logs_and_draws_them(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train([*words, "trainer.max_steps=2"]) == 0
    with (run / "metrics.csv").open() as table:
        last = list(csv.DictReader(table))[-1]
    for keep in VALIDATION_KEEPS:
        lost, soft = (float(last[f"val/{name}_kl@{keep:g}"]) for name in ("learned", "soft"))
        assert float(last[f"val/gap@{keep:g}"]) == pytest.approx(lost - soft, abs=1e-4)
        assert 0 <= float(last[f"val/changed@{keep:g}"]) < 1
    with (run / "marginal.csv").open() as table:
        rows = list(csv.DictReader(table))
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    spread = torch.tensor([float(row["keep_0.1"]) for row in rows]).std().item()
    assert float(last["val/marginal_spread@0.1"]) == pytest.approx(spread, rel=1e-3)
    for picture in ("validation.png", "marginal.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
