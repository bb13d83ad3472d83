"""Attention of a prompt's text to its images."""

from typing import NamedTuple

import torch
from torch import Tensor


class TextAttention(NamedTuple):
    """Attention of the text among a prompt's last queries."""

    weights: Tensor
    """[B, H, W, S] mean over the query heads of a kv head; 0 for queries that are no text."""
    is_text: Tensor
    """[B, W] True for queries that are text."""
    is_image: Tensor
    """[B, 1, S] True for entries of images."""


def text_attention(weights: Tensor, query_positions: Tensor, valid: Tensor, is_image: Tensor | None) -> TextAttention:
    """Attention of the window's queries that are text.

    Args:
        weights: [B, H, G, W, S] softmax weights of the last W queries.
        query_positions: [B, W], negative where the slot is padding.
        valid: [B, H, S] False where there is no entry.
        is_image: [B, S] True for slots of images; None: all are text.
    """
    window = weights.shape[3]
    images = torch.zeros_like(valid[:, 0]) if is_image is None else is_image.to(valid.device)
    text = (query_positions >= 0) & ~images[:, images.shape[1] - window :]
    attention = weights.mean(2).masked_fill(~text[:, None, :, None], 0.0)
    return TextAttention(attention, text, (images & valid[:, 0]).unsqueeze(1))
