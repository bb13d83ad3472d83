"""Logits of an untouched model where heads see some entries of a prompt only."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "masked_entries"


def masked_logits(
    model: PreTrainedModel,
    prompt: Tensor,
    new_tokens: Tensor,
    kept: Mapping[int, Sequence[Tensor]],
    inputs: Mapping[str, Tensor] | None = None,
    position: int | None = None,
) -> Tensor:
    """Logits [T, V] of tokens [T] after a prompt [S], of which the heads of layers see the positions `kept` only.

    Args:
        inputs: what is read of the prompt beside its ids.
        position: of the first new token; None: S.
    """
    entries, before = len(prompt), model.config._attn_implementation

    def attention(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **more: Any
    ) -> Any:
        group, new, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
        visible = torch.ones(key.shape[1], new, total, dtype=torch.bool).tril(total - new)
        if attention_mask is not None:
            visible = visible & attention_mask[0]
        for head, positions in enumerate(kept.get(module.layer_idx, ())):
            evicted = torch.ones(total, dtype=torch.bool)
            evicted[positions], evicted[entries:] = False, False
            visible[head] &= ~evicted
        query, key, value = (part.double() for part in (query, key, value))
        key, value, visible = (part.repeat_interleave(group, dim) for part, dim in ((key, 1), (value, 1), (visible, 0)))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(-1, -2) * scale
        if (cap := more.get("softcap")) is not None:
            scores = cap * torch.tanh(scores / cap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if (sinks := more.get("s_aux")) is not None:  # an entry more, without a value
            scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        weights = scores.softmax(-1)[..., :total]
        return (weights @ value).transpose(1, 2).float().contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    cache = DynamicCache(config=model.config)
    model(input_ids=prompt.unsqueeze(0), past_key_values=cache, **(inputs or {}))
    model.set_attn_implementation(NAME)
    try:
        positions = (torch.arange(len(new_tokens)) + (entries if position is None else position)).unsqueeze(0)
        return model(input_ids=new_tokens.unsqueeze(0), position_ids=positions, past_key_values=cache).logits[0]
    finally:
        model.set_attn_implementation(before)
