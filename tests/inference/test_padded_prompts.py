"""Padded prompts are read row by row on a CPU."""

from typing import Any

import pytest
import torch
from support.models import attached, padded, tokens
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from learnkv import prefill
from learnkv.inference import padded_prompts
from learnkv.inference.padded_prompts import prompt_attention


class Layer(nn.Module):
    """What transformers' sdpa reads of a layer."""

    num_key_value_groups = 3
    is_causal = True


def inputs(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots, generator = max(lengths), torch.Generator().manual_seed(0)
    query = torch.randn(len(lengths), 6, slots, 8, generator=generator)
    key, value = torch.randn(2, len(lengths), 2, slots, 8, generator=generator)
    valid = torch.arange(slots) >= slots - torch.tensor(lengths).unsqueeze(-1)
    mask = torch.ones(slots, slots, dtype=torch.bool).tril() & valid[:, None, None]
    return query, key, value, mask


@pytest.mark.parametrize("lengths", [[9, 9], [9, 4, 1], [12]])
def test_tokens_attend_as_with_the_mask_and_padding_is_zero(lengths: list[int]) -> None:
    given = inputs(lengths)
    found = prompt_attention(Layer(), *given, scaling=0.3)
    expected, _ = sdpa_attention_forward(Layer(), *given, scaling=0.3)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row, -length:], expected[row, -length:])
        assert not found[row, : found.shape[1] - length].any()


def masks(mask: Tensor) -> list[Tensor]:
    """Masks that are not causal over left padding, each by one change."""
    window, image, right, empty = (mask.clone() for _ in range(4))
    window[..., -1, -9] = False
    image[1, :, -3, -2] = True
    right[1, ..., -1] = False
    empty[1] = False
    return [window, image, right, empty]


def test_another_mask_is_given_to_sdpa_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value, mask = inputs([9, 4])
    seen: list[Any] = []
    plain = sdpa_attention_forward
    monkeypatch.setattr(
        padded_prompts, "sdpa_attention_forward", lambda *given, **more: seen.append(given[4]) or plain(*given, **more)
    )
    for other in masks(mask):
        prompt_attention(Layer(), query, key, value, other)
        assert seen.pop() is other
    prompt_attention(Layer(), query[:, :, -3:], key, value, mask[:, :, -3:])  # a chunk after others
    assert seen.pop() is not None
    prompt_attention(Layer(), query, key, value, mask)
    assert seen == [None, None]


@pytest.mark.parametrize("family", ["llama", "qwen3", "olmo2"])
def test_a_model_reads_a_padded_row_as_it_does_alone(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = attached(family), [tokens(1, length, seed=length)[0] for length in (24, 13)]
    without_mask: list[bool] = []
    plain = sdpa_attention_forward
    monkeypatch.setattr(
        padded_prompts,
        "sdpa_attention_forward",
        lambda *given, **more: without_mask.append(given[4] is None) or plain(*given, **more),
    )
    with torch.no_grad():
        both = prefill(model, *padded(rows))
        assert without_mask
        assert all(without_mask)
        alone = prefill(model, rows[1].unsqueeze(0))
    for one, other in zip(both.compressed_layers(), alone.compressed_layers(), strict=True):
        torch.testing.assert_close(one.prompt.keys[1:, :, -13:], other.prompt.keys, rtol=1e-4, atol=1e-5)
