"""Training: complete prompts as levels of precision store them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from learnkv.cache.eviction import compact
from learnkv.cache.layer import CompressedLayer
from learnkv.cache.states import Prompt, StoredPrompt
from learnkv.cache.storage import Segment
from learnkv.core.codec import Codec
from learnkv.core.precision import Level


def compact_stored(
    layers: list[CompressedLayer],
    scores: Tensor,
    budgets: Tensor,
    total: int,
    levels: Sequence[Level],
    chosen: Tensor,
) -> Iterator[tuple[int, Segment, tuple[StoredPrompt, ...]]]:
    """Number of each layer, the segment of its kept entries as stored, and its whole prompt as stored at each level.

    Attention to the segment is that to the tiers of the deployed cache: the same codes, decoded and turned back.

    Args:
        scores, budgets, total: as of `compact`.
        levels: M.
        chosen: [L, B, H, S] level of every entry, 1 … M; 0: evicted.
    """
    prompts = [layer.prompt for layer in layers]
    stored = [stored_prompt(prompt, levels, idx) for idx, prompt in enumerate(prompts)]
    for layer, prompt, at_levels, of_entry in zip(layers, prompts, stored, chosen, strict=True):
        layer.state = _mixed(prompt, at_levels, of_entry.to(prompt.keys.device))
    for layer_idx, segment in compact(layers, scores, budgets, total, None, None):
        layers[layer_idx].state = prompts[layer_idx]
        yield layer_idx, segment, stored[layer_idx]


def stored_prompt(prompt: Prompt, levels: Sequence[Level], layer_idx: int) -> tuple[StoredPrompt, ...]:
    """The prompt at every level, in the model's own basis; computed once for all students of a prompt."""

    def part(name: str, codec: Codec) -> Tensor:
        entries: Tensor = getattr(prompt, name)
        if codec.unchanged and entries.element_size() <= 2:
            return entries
        if (name, codec) not in prompt.stored:
            prompt.stored[name, codec] = codec.round_trip(entries, layer_idx, entries.shape[1])
        return prompt.stored[name, codec]

    return tuple(StoredPrompt(part("keys", level.keys), part("values", level.values)) for level in levels)


def _mixed(prompt: Prompt, stored: Sequence[StoredPrompt], chosen: Tensor) -> Prompt:
    """The prompt with every kept entry as its level stores it."""
    keys, values = prompt.keys, prompt.values
    for number, at_level in enumerate(stored, start=1):
        here = (chosen == number).unsqueeze(-1)
        keys, values = torch.where(here, at_level.keys, keys), torch.where(here, at_level.values, values)
    return replace(prompt, keys=keys, values=values)
