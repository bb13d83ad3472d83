"""TGV-KV against the formulas of its paper, written out for one row, and on a model that reads images."""

import dataclasses

import pytest
import torch
from support.observations import observe
from support.vision import IMAGE, attached, prompt
from torch import Tensor

from learnkv import allocators, load_policy, prefill, scorers
from learnkv.core.observation import Observation
from learnkv.errors import UserError

BEGIN, END = 5, 14
"""Slots of the image in a prompt of 30."""


def with_image(lengths: list[int], seed: int = 0) -> Observation:
    obs = observe(lengths, window=64, seed=seed)
    is_image = torch.zeros(len(lengths), max(lengths), dtype=torch.bool)
    for row, length in enumerate(lengths):
        padding = max(lengths) - length
        is_image[row, padding + BEGIN : padding + END] = True
    return dataclasses.replace(obs, is_image=is_image)


def by_the_paper(obs: Observation) -> tuple[Tensor, float]:
    """Scores of the image's tokens in the first row, and the layer's attention from text to them."""
    weights, _ = obs.window_attention(64)
    attention = weights[0].mean((0, 1)).double()  # [S, S]: every token is among the queries
    text = range(END, attention.shape[0])
    ranked = []
    for token in range(BEGIN, END):
        score = 0.0
        for t in text:
            prominence = sum(float(attention[i, t]) for i in text if i >= t) / len([i for i in text if i >= t])
            score += prominence * float(attention[t, token])
        ranked.append(score)
    return torch.tensor(ranked), float(attention[END:, BEGIN:END].sum())


def test_images_are_ranked_by_what_prominent_text_attends_to() -> None:
    obs = with_image([30])
    scores = scorers.TGVKV()(obs)
    expected, mass = by_the_paper(obs)
    for head in range(2):
        torch.testing.assert_close(scores[0, head, BEGIN:END], expected.float(), rtol=1e-4, atol=1e-6)
    is_text = ~obs.is_image[0]
    assert scores[0, 0, is_text].min() > scores[0, 0, ~is_text].max()
    got = allocators.TGVKV().features(obs)
    assert float(got.mean()) == pytest.approx(mass, rel=1e-4)


def test_a_padded_row_with_an_image_is_scored_as_alone() -> None:
    both, alone = with_image([40, 30]), with_image([30])
    for component in (scorers.TGVKV(), allocators.TGVKV().features):
        got, expected = component(both)[1:], component(alone)
        torch.testing.assert_close(got[:, :, -expected.shape[-1] :], expected, rtol=1e-5, atol=1e-6)


def test_layers_get_entries_in_proportion_to_the_attention_to_images() -> None:
    features = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 2, 1)
    budget = torch.tensor([10.0], dtype=torch.float64)
    assert allocators.TGVKV()(torch.rand(2, 1, 2, 50), features, budget)[:, 0].tolist() == [[5, 5], [15, 15]]
    assert allocators.TGVKV()(torch.rand(2, 1, 2, 50), 0 * features, budget)[:, 0].tolist() == [[10, 10]] * 2


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_text_survives_in_a_model_that_reads_an_image(family: str) -> None:
    policy, (ids, inputs) = load_policy("tgv_kv"), prompt(family, 40)
    cache = policy.compress(prefill(attached(family), ids, policies=[policy], inputs=inputs), keep=0.9)
    assert cache.spent == [pytest.approx(0.9, abs=0.01)]
    text = (ids[0] != IMAGE).nonzero().flatten()
    kept = [len(cache.kept_positions(layer, 0, 0)) for layer in cache.compressible]
    for layer, count in zip(cache.compressible, kept, strict=True):
        for head in range(2):
            missing = ~torch.isin(text, cache.kept_positions(layer, 0, head))
            assert bool(missing.any()) == (count < len(text))


def test_what_is_not_known_is_refused() -> None:
    obs = dataclasses.replace(with_image([30]), aligned=False)
    for part in (scorers.TGVKV(), allocators.TGVKV().features):
        with pytest.raises(UserError, match="which entries are images is not known"):
            part(obs)
    for cls in (scorers.TGVKV, allocators.TGVKV):
        with pytest.raises(UserError, match="window=0"):
            cls(window=0)
