"""The indexer's formula, its training, and what it ranks with the file that ships."""

import dataclasses

import pytest
import torch
from support.components import build
from support.models import attached, tokens
from support.observations import observe

from learnkv import Policy, load_model, load_policy, prefill
from learnkv.calibration.indexer import _Everything, _unrotated, indexer, indexer_loss, initial_indexer
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import TABLES
from learnkv.ops.window_attention import window_logits
from learnkv.scorers import IndexMem


def test_the_score_is_that_of_the_formula() -> None:
    scorer = build(IndexMem, 2, 2, 3, 16)
    obs = observe([40], window=32)
    obs = dataclasses.replace(obs, statistics={scorer._features: scorer.token_features(obs)})
    weights = {name: part[1] for name, part in scorer.weights.items()}
    hidden, queries = obs.hidden[0], obs.queries[0].transpose(0, 1).flatten(1)

    def norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean() + torch.finfo(torch.float32).eps).sqrt() * scale

    expected = torch.full((40,), -torch.inf)
    for number, position in enumerate(range(8, 40)):
        small = (weights["query.weight"] @ queries[number]).view(2, 4)
        gate = weights["gate.weight"] @ hidden[position] / 8**0.5
        for entry in range(position + 1):
            key = norm(weights["key.weight"] @ hidden[entry], weights["k_norm.weight"])
            products = torch.stack([norm(row, weights["q_norm.weight"]) @ key for row in small])
            expected[entry] = torch.maximum(expected[entry], (gate * products.relu()).sum())
    for head in scorer(obs)[0]:
        torch.testing.assert_close(head, expected, rtol=1e-4, atol=1e-5)


def test_training_brings_the_indexer_nearer_to_the_attention() -> None:
    model, contexts = attached("llama"), [tokens(1, 60, seed=seed) for seed in range(2)]
    read = [prefill(model, context, policies=[Policy(_Everything())]) for context in contexts]
    start, learned = (indexer(model, contexts, steps, learning_rate=0.05) for steps in (1, 60))
    for number in range(3):
        observations = [cache.compressed_layers()[number].observation() for cache in read]
        before, after = (
            sum(
                float(indexer_loss({name: part[number] for name, part in weights.items()}, obs, _unrotated(obs), end))
                for obs in observations
                for end in (36, 44, 52, 60)
            )
            for weights in (start, learned)
        )
        assert 0 < after < 0.7 * before


def test_the_shipped_indexer_ranks_what_the_model_attends_to() -> None:
    """Entries that it keeps hold more of the largest attention than as many at random do."""
    model, tokenizer = load_model("reference")
    ids = tokenizer("Rain fell on the hills all day. The number of Ada is 4817. " * 12, return_tensors="pt").input_ids
    policy = load_policy("indexmem")
    cache = prefill(model, ids, policies=[policy])
    shares = []
    for layer in cache.compressed_layers():
        obs = layer.observation()
        logits, _ = window_logits(
            obs.queries,
            obs.keys,
            query_positions=obs.query_positions,
            positions=obs.positions,
            valid=obs.valid,
            scaling=obs.scaling,
        )
        target = logits.amax((1, 2, 3))[0, 4:].float().softmax(-1)
        best = policy.scorer(obs)[0, 0, 4:].topk(len(target) // 4).indices
        shares.append(float(target[best].sum()))
    assert sum(shares) / len(shares) > 0.4


def test_sizes_and_files_are_checked() -> None:
    made = initial_indexer(8, 32, 48, torch.Generator().manual_seed(0))
    assert {name: part.dim() + 1 for name, part in made.items()} == {k: len(v) for k, v in tensors.INDEXER.items()}
    assert made["gate.weight"].shape == (2, 48)
    assert tensors.read(TABLES / "indexer.safetensors", tensors.INDEXER)["key.weight"].shape[1] == 4
    with pytest.raises(UserError, match="learnkv calibrate"):
        prefill(attached("llama"), tokens(1, 20), policies=[load_policy("indexmem")])
    with pytest.raises(UserError, match="evict_interval=8: IndexMem reads of a prompt"):
        Policy(build(IndexMem, 2, 2, 3, 16), evict_interval=8)
