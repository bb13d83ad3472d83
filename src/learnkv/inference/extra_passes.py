"""Scores of prompts that have been read, and the extra passes over them that scorers ask for."""

import functools

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import CompressedLayer
from learnkv.core.observation import CaptureSpec, PassTokens, PromptPass
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError


@torch.no_grad()
def run_extra_pass(
    model: PreTrainedModel, cache: CompressedCache, prompt_pass: PromptPass, ids: Tensor, mask: Tensor
) -> None:
    """Read what `probe` asks for after prompts [B, S] that `cache` holds complete; it keeps the figures, nothing else.

    Raises:
        UserError: for a prompt and a pass that are longer than the model's context.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    spent = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    for told in prompt_pass.passes(ids, mask):
        longest = int((mask.sum(-1) + told.mask.sum(-1)).max())
        if context is not None and longest > context:
            raise UserError(
                f"a pass of {told.ids.shape[1]} tokens after the prompt makes {longest}, the model's context is "
                f"{context}: repeat fewer tokens per pass (chunk)"
            )
        fork = cache.fork()
        for layer, home in zip(fork.compressed_layers(), cache.compressed_layers(), strict=True):
            layer.listen(
                CaptureSpec(told.ids.shape[1], prompt_pass.hidden),
                functools.partial(_note, prompt_pass, told, layer, home),
            )
        there = torch.cat([mask, told.mask], 1)
        model(
            input_ids=told.ids,
            attention_mask=None if bool(there.all()) else there,
            position_ids=(there.cumsum(-1) - 1).clamp_min(0)[:, mask.shape[1] :],
            past_key_values=fork,
            use_cache=True,
            logits_to_keep=1,
        )
        spent += told.mask.sum(-1)
    cache.extra_pass_tokens = {**cache.extra_pass_tokens, prompt_pass: spent.tolist()}


def _note(prompt_pass: PromptPass, told: PassTokens, layer: CompressedLayer, home: CompressedLayer) -> None:
    """Let the probe see what the layer saw; then the layer, which no one reads again, lets go of it."""
    known = home.capture.statistics
    figure = prompt_pass.update(layer.observation(), told, known.get(prompt_pass))
    home.capture.statistics = {**known, prompt_pass: figure}
    layer.keys = layer.values = None
    layer.capture.forget()


@torch.no_grad()
def scores_of(cache: CompressedCache, scorer: Scorer) -> Tensor:
    """Scores [L, B, H, S] of a complete prompt that was read for a policy with this scorer, -inf at padding."""
    seen = [layer.observation() for layer in cache.compressed_layers()]
    return torch.stack([scorer(one).masked_fill(~one.valid, float("-inf")) for one in seen])
