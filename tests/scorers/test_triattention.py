"""TriAttention: the identities of its scores, sets that heads and layers share, and the calibrated file."""

import dataclasses
from pathlib import Path

import pytest
import torch
from support.models import attached, tokens
from support.observations import observe
from support.tables import made_up
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, load_model, prefill
from learnkv.calibration.frequencies import query_frequencies
from learnkv.calibration.trials import sample_trials
from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import TABLES
from learnkv.ops.reduce_layers import reduce_layers
from learnkv.scorers import TriAttention

SHAPE = (3, 2, 2, 16, 48)


def measured(scale: float, folder: Path) -> str:
    """A made-up file of two layers of 6 query heads, whose rotation scales keys and queries by `scale`."""
    held = tensors.read(made_up("queries", 2, 2, 3), tensors.FREQUENCIES)
    held["scale"] = held["scale"] * scale
    return str(tensors.write(folder / "queries.safetensors", held))


@pytest.mark.parametrize("scale", [1.0, 1.1386])  # the second is YaRN's for a factor of 4
def test_scores_from_rotated_keys_are_those_of_the_formula(scale: float, tmp_path: Path) -> None:
    """Score from keys before RoPE, one distance after the other, in double precision."""
    path = measured(scale, tmp_path)
    held = {name: tensor[1].double() for name, tensor in tensors.read(path, tensors.FREQUENCIES).items()}
    obs = observe([50])
    before = torch.complex(*obs.keys[0].double().split(8, -1))  # [H, S, F]
    angle = obs.positions[0, 0].view(-1, 1) * held["frequency"]
    rotated = scale * before * torch.polar(torch.ones_like(angle), angle)
    obs = dataclasses.replace(obs, keys=torch.cat([rotated.real, rotated.imag], -1).float().unsqueeze(0))
    mu = torch.complex(*held["mean"].split(8, -1)).unflatten(0, (2, 3)).unsqueeze(2)  # [H, G, 1, F]
    beside = held["magnitude"].unflatten(0, (2, 3)).unsqueeze(2) - mu.abs()
    ahead = 50 - obs.positions[0, 0].double().view(-1, 1)  # the next position less that of the key
    terms = []
    for power in range(7):
        phase = (ahead + 2**power) * held["frequency"] + (mu * before.unsqueeze(1).conj()).angle()
        wave = mu.abs() * phase.cos() + beside
        terms.append(scale**2 * (wave * before.unsqueeze(1).abs()).sum(-1))
    for aggregation, expected in (("mean", torch.stack(terms).mean(0)), ("max", torch.stack(terms).amax(0))):
        scorer = TriAttention(furthest=64, aggregation=aggregation, queries=path)
        torch.testing.assert_close(scorer.raw_scores(obs)[0].double(), expected, rtol=1e-4, atol=1e-4)


def compressed(sharing: str, **spend: float) -> tuple[CompressedCache, Policy]:
    policy = Policy(TriAttention(sharing=sharing, queries=made_up("queries", *SHAPE)), evict_interval=8)
    return prefill(attached("llama"), tokens(2, 60), policy=policy, **spend), policy


def sets(cache: CompressedCache, row: int) -> list[list[tuple[int, ...]]]:
    """Positions that are kept, by layer and head."""
    return [[tuple(cache.kept_positions(layer, row, head).tolist()) for head in (0, 1)] for layer in cache.compressible]


@pytest.mark.parametrize(("sharing", "different"), [("none", 6), ("per_head", 2), ("union", 1)])
def test_as_many_sets_as_are_shared_also_while_tokens_are_added(sharing: str, different: int) -> None:
    cache, _ = compressed(sharing, keep=0.3)
    for step in range(4):
        for row in (0, 1):
            kept = sets(cache, row)
            assert len({one for layer in kept for one in layer}) == different
            assert sharing != "per_head" or all(layer == kept[0] for layer in kept)
        continuation(attached("llama"), tokens(2, 8, seed=step), cache)


def test_shared_scores_count_only_heads_that_hold_the_token() -> None:
    def layer(positions: list[list[int]]) -> Observation:
        index = torch.tensor([positions])
        return dataclasses.replace(observe([3]), positions=index, valid=index >= 0, aligned=False)

    layers = [layer([[0, 1, 5], [-1, 1, 2]]), layer([[1, 2, 5], [0, 1, 2]])]
    scores = torch.tensor([[[[1.0, 2, 3], [9, 4, 5]]], [[[6.0, 7, torch.inf], [8, 9, 10]]]])
    scores[0, 0, 1, 0] = -torch.inf

    def shared(**how: object) -> list[list[list[float]]]:
        result: Tensor = reduce_layers(layers, scores, **how)
        return result[:, 0].tolist()

    assert shared(reduce="mean") == [[[1, 4, 3], [0, 6.5, 7.5]], [[4, 7, 0], [8, 6.5, 7.5]]]
    assert shared(reduce="max", over_heads=True) == [[[8, 9, 3], [0, 9, 10]], [[9, 10, 0], [8, 9, 10]]]


def test_own_queries_are_refused_while_tokens_are_added() -> None:
    with pytest.raises(UserError, match="evict_interval=8: TriAttention reads of a prompt what is not held"):
        Policy(TriAttention(), evict_interval=8)


def test_a_file_of_another_model_is_refused() -> None:
    policy = Policy(TriAttention(queries=made_up("queries", 3, 2, 3)))
    with pytest.raises(UserError, match="made for 3 layers of 6 heads of 16, layer 0 of the model has 4 of 16"):
        prefill(attached("llama"), tokens(1, 40), policy=policy, keep=0.5)


def test_measured_queries_are_those_that_rope_rotates() -> None:
    """After q_norm: on Qwen3 the output of q_proj is something else."""
    model, shown = attached("qwen3"), []
    norm = model.model.layers[1].self_attn.q_norm
    hook = norm.register_forward_hook(lambda module, given, made: shown.append(made[0].double()))
    contexts = [tokens(1, length, seed=length) for length in (40, 64)]
    with torch.no_grad():
        for context in contexts:
            model(input_ids=context)
    hook.remove()
    queries = torch.cat(shown).transpose(0, 1)  # [N, T, D]
    pairs = queries.shape[-1] // 2
    found = query_frequencies(model, contexts)
    torch.testing.assert_close(found["mean"][1], queries.mean(1), rtol=1e-3, atol=1e-4)
    magnitude = torch.hypot(queries[..., :pairs], queries[..., pairs:]).mean(1)
    torch.testing.assert_close(found["magnitude"][1], magnitude, rtol=1e-3, atol=1e-4)
    theta = model.config.rope_parameters["rope_theta"]
    frequency = theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    torch.testing.assert_close(found["frequency"][1], frequency, rtol=1e-4, atol=1e-6)


def test_the_shipped_file_is_the_reference_models() -> None:
    model, tokenizer = load_model("reference")
    held = tensors.read(TABLES / "query_frequencies.safetensors", tensors.FREQUENCIES)
    here = query_frequencies(model, [trial.context for trial in sample_trials(tokenizer, 192, 2, seed=3)])
    torch.testing.assert_close(held["frequency"], here["frequency"].float(), rtol=1e-4, atol=1e-6)
    for name in ("mean", "magnitude"):
        assert float(torch.corrcoef(torch.stack([held[name].flatten(), here[name].flatten().float()]))[0, 1]) > 0.95
