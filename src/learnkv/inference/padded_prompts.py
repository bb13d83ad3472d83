"""Attention of padded prompts row by row on a CPU, where a mask costs more than further calls."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def prompt_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """Attention [B, T, H*G, D] of prompts by transformers' sdpa; of padded ones each row without its padding.

    With a mask sdpa computes what it hides, too: causal attention without one is half the work. The outputs of padding
    are 0. Where the mask is another than the causal one of left-padded rows, sdpa gets it.

    Args:
        query: [B, H*G, T, D].
        key, value: [B, H, S, D].
        mask: [B, 1, T, S] bool; None: causal, without padding.
        options: of transformers' sdpa.
    """
    tokens = _tokens_of_rows(query, key, mask)
    if tokens is None:
        whole: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return whole
    slots, parts = query.shape[2], []
    for row, count in enumerate(tokens):
        own = (part[row : row + 1, :, slots - count :] for part in (query, key, value))
        output, _ = sdpa_attention_forward(module, *own, None, **{**options, "is_causal": True})
        parts.append(nn.functional.pad(output, (0, 0, 0, 0, slots - count, 0)))
    return torch.cat(parts)


def _tokens_of_rows(query: Tensor, key: Tensor, mask: Tensor | None) -> list[int] | None:
    """Tokens of each row where the mask is that of left-padded prompts that are read whole; else None."""
    slots = query.shape[2]
    if mask is None or mask.dtype != torch.bool or query.device.type != "cpu" or key.shape[2] != slots:
        return None
    if slots < 2 or mask.shape != (query.shape[0], 1, slots, slots):
        return None
    counts: list[int] = mask[:, 0, -1].sum(-1).tolist()
    causal = torch.ones(slots, slots, dtype=torch.bool).tril()
    for row, count in enumerate(counts):
        first = slots - count  # what padding attends to does not matter
        seen, own = mask[row, 0, first:, :first], mask[row, 0, first:, first:]
        if not count or bool(seen.any()) or not torch.equal(own, causal[first:, first:]):
            return None
    return counts
