"""Extra passes of a model over a complete prompt, for scorers that need them."""

import functools
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.cache.layer import CompressedLayer
from learnkv.core.observation import CaptureSpec, PassTokens, PromptPass
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.inference.models import context_length
from learnkv.inference.pass_gradients import gradient_norms


@torch.no_grad()
def run_extra_passes(
    model: PreTrainedModel,
    cache: CompressedCache,
    passes: Iterable[PromptPass],
    ids: Tensor,
    mask: Tensor | None,
) -> None:
    """`run_extra_pass` of all `passes` over prompts [B, S]; a mask of None: no padding."""
    of_tokens = torch.ones_like(ids).bool() if mask is None else mask
    for prompt_pass in passes:
        run_extra_pass(model, cache, prompt_pass, ids, of_tokens)


@torch.no_grad()
def run_extra_pass(
    model: PreTrainedModel, cache: CompressedCache, prompt_pass: PromptPass, ids: Tensor, mask: Tensor
) -> None:
    """Read the tokens of `prompt_pass` after complete prompts [B, S]; the cache keeps its statistic only.

    Raises:
        UserError: for a prompt and a pass that are longer than the model's context.
    """
    shift = 0 if cache.images is None else torch.tensor(cache.images.shifts).unsqueeze(-1).to(ids.device)
    read = torch.zeros(ids.shape[0], dtype=torch.long, device=ids.device)
    for tokens in prompt_pass.passes(ids, mask):
        check_pass(model, tokens, mask)
        if prompt_pass.gradients:
            tokens = replace(tokens, gradient_norms=gradient_norms(model, cache, tokens, mask))
        fork = cache.fork()
        for layer, source in zip(fork.compressed_layers(), cache.compressed_layers(), strict=True):
            spec = CaptureSpec(tokens.ids.shape[1], prompt_pass.hidden)
            layer.listen(spec, functools.partial(_update_statistic, prompt_pass, tokens, layer, source))
        both = torch.cat([mask, tokens.mask], 1)
        model(
            input_ids=tokens.ids,
            attention_mask=None if bool(both.all()) else both,
            position_ids=(both.cumsum(-1) - 1).clamp_min(0)[:, mask.shape[1] :] + shift,
            past_key_values=fork,
            use_cache=True,
            logits_to_keep=1,
        )
        read += tokens.mask.sum(-1)
    cache.extra_pass_tokens = {**cache.extra_pass_tokens, prompt_pass: read.tolist()}


def check_pass(model: PreTrainedModel, tokens: PassTokens, mask: Tensor) -> None:
    """Raise UserError for prompts with the mask [B, S] and a pass that are longer than the model's context."""
    context = context_length(model)
    longest = int((mask.sum(-1) + tokens.mask.sum(-1)).max())
    if context is not None and longest > context:
        raise UserError(
            f"a pass of {tokens.ids.shape[1]} tokens after the prompt makes {longest}, the model's context is "
            f"{context}: repeat fewer tokens per pass (chunk)"
        )


def _update_statistic(
    prompt_pass: PromptPass, tokens: PassTokens, layer: CompressedLayer, source: CompressedLayer
) -> None:
    """Update the statistic of `source` from a layer of its fork, which is not read again and frees its prompt."""
    statistics = source.capture.statistics
    updated = prompt_pass.update(layer.observation(), tokens, statistics.get(prompt_pass))
    source.capture.statistics = {**statistics, prompt_pass: updated}
    layer.release()


@torch.no_grad()
def scores_of(cache: CompressedCache, scorer: Scorer) -> Tensor:
    """Scores [L, B, H, S] of a complete prompt that was read for a policy with this scorer, -inf at padding."""
    observations = [layer.observation() for layer in cache.compressed_layers()]
    return torch.stack([scorer(obs).masked_fill(~obs.valid, float("-inf")) for obs in observations])
