"""Reading a prompt once with full attention."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.core.observation import CaptureSpec, HiddenSample
from learnkv.core.scorer import Scorer
from learnkv.errors import UserError
from learnkv.inference.attention import attach
from learnkv.inference.extra_passes import run_extra_passes, scores_of
from learnkv.inference.image_prompts import PromptInputs, prompt_inputs
from learnkv.inference.models import context_length, describe_model
from learnkv.inference.protected_spans import Anchors, Protect, protection_of, unpadded
from learnkv.inference.state_checks import refuse_padding
from learnkv.inference.token_ids import check_ids, check_mask
from learnkv.policy.byte_budget import ByteCount
from learnkv.policy.layerwise import compress_when_read
from learnkv.policy.policy import Policy


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    chunk_size: int | None = None,
    window: int = 64,
    policies: Iterable[Policy] = (),
    policy: Policy | None = None,
    keep: float | None = None,
    budget: float | None = None,
    bytes: ByteCount | None = None,
    sample: HiddenSample | None = None,
    protect: Protect | None = None,
    protect_after: Sequence[str] | Anchors | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> CompressedCache:
    """Read prompts with full attention; returns a cache of all entries, or of those that `policy` keeps.

    Args:
        model: a causal language model; `attach` is called if it was not.
        input_ids: [B, S] left-padded.
        attention_mask: [B, S] 1 for tokens, 0 for padding; None: no padding.
        chunk_size: tokens read at once, at least 1; None: all. Chunks may end anywhere.
        window: last queries to capture for scorers, at least.
        policies: policies that will compress forks of the cache. What they need beside keys and values is captured, and
            their extra passes over the prompt are run.
        policy: compress to `keep`, `budget` or `bytes`, as of `Policy.compress`. With a static or sequential allocator
            every layer is evicted as soon as it has read the end of the prompt; without chunks, only one layer at a
            time holds all of its entries.
        sample: tokens whose hidden states trained scorers get gradients from; None: the default of `HiddenSample`.
        protect: tokens that every policy keeps in every head, within the budget: spans (begin, end) of all prompts
            alike, or a list of them for each, counted without padding; or `system`, the system message of a chat.
        protect_after: words such as "password:" after which tokens are kept as far as a share of the budget goes.
        tokenizer: of `system` and words.
        inputs: what the processor of a vision-language model gives besides (`pixel_values`, `image_grid_thw`, …), or
            `inputs_embeds` [B, S, E] in place of what the ids are embedded as.

    Raises:
        UserError: for an empty prompt, right padding, one longer than the context, a budget below what is protected.
    """
    lengths = _check_prompt(model, input_ids, attention_mask, chunk_size)
    attach(model)
    prompt = prompt_inputs(model, input_ids, attention_mask, inputs, chunk_size)
    if policy is not None:
        policy.check_spend(keep, budget, bytes)
    capture_spec = _capture_spec(model, _checked_policies(policies, policy), window)
    cache = _empty_cache(model, input_ids, lengths, prompt, capture_spec.with_sample(sample))
    if protect is not None or protect_after is not None:
        cache.protection = protection_of(unpadded(input_ids, lengths), protect, protect_after, tokenizer)
    mask = _padding(model, attention_mask)
    one_shot = policy if policy is not None and policy.reads_once and (keep != 1 or policy.precision) else None
    for begin in range(0, slots := input_ids.shape[1], step := chunk_size or slots):
        if one_shot is not None and begin + step >= slots:
            compress_when_read(one_shot, cache, keep, budget, bytes)
        _read_chunk(model, cache, input_ids, mask, slice(begin, min(begin + step, slots)), prompt)
    run_extra_passes(model, cache, capture_spec.extra_passes, input_ids, mask)
    cache.seal()
    return cache if policy is None or one_shot is not None else policy.compress(cache, keep, budget, bytes)


def _empty_cache(
    model: PreTrainedModel, ids: Tensor, lengths: list[int], prompt: PromptInputs, capture_spec: CaptureSpec
) -> CompressedCache:
    """A cache that is about to read prompts of these lengths."""
    cache = CompressedCache(model.config, capture_spec)
    cache.set_prompt(lengths, ids, prompt.images)
    return cache


def _padding(model: PreTrainedModel, attention_mask: Tensor | None) -> Tensor | None:
    """The mask [B, S] of prompts with padding; UserError for a model whose states it would change."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    refuse_padding(model)
    return attention_mask.bool()


def _capture_spec(model: PreTrainedModel, policies: Iterable[Policy], window: int) -> CaptureSpec:
    """What is captured for these policies; UserError for one that was made for a model of other sizes."""
    described, capture_spec = describe_model(model), CaptureSpec(window)
    for each in policies:
        each.check_sizes(described["shapes"], described["id"])
        capture_spec |= each.capture_spec
    return capture_spec


def _checked_policies(policies: Iterable[Policy], policy: Policy | None) -> list[Policy]:
    """All policies as a list; UserError for a single one, a name or anything else among `policies`."""
    if isinstance(policies, str | Policy):
        raise UserError(f"policies= of type {type(policies).__name__}: expected a list of policies")
    listed = [*policies] if policy is None else [*policies, policy]
    for each in listed:
        if not isinstance(each, Policy):
            raise UserError(f"policies= with a {type(each).__name__}: expected policies, as load_policy gives them")
    return listed


def score_prompt(
    model: PreTrainedModel, scorer: Scorer, input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Scores of all entries of prompts, [L, B, H, S] float32, -inf at padding; also a teacher's signal.

    Args:
        input_ids, attention_mask: as for `prefill`.
    """
    return scores_of(prefill(model, input_ids, attention_mask, window=0, policies=[Policy(scorer)]), scorer)


def _read_chunk(
    model: PreTrainedModel,
    cache: CompressedCache,
    input_ids: Tensor,
    mask: Tensor | None,
    chunk: slice,
    prompt: PromptInputs,
) -> None:
    """Read the slots `chunk` of prompts [B, S]; `mask` [B, S], None: no padding."""
    if prompt.positions is not None:
        positions = prompt.positions[..., chunk]
    elif mask is None:
        positions = torch.arange(chunk.start, chunk.stop, device=input_ids.device).expand(len(input_ids), -1)
    else:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, chunk]
    bound = max(cache.prompt_lengths) if prompt.positions is None else int(positions.max()) + 1
    cache.expected_pass = positions, bound
    model(
        **prompt.chunk(input_ids, chunk),
        attention_mask=None if mask is None else mask[:, : chunk.stop],
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def _check_prompt(model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None, chunk_size: int | None) -> list[int]:
    """Tokens of every prompt."""
    if chunk_size is not None and chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size}: expected at least 1 token")
    check_ids(input_ids, model)
    check_mask(input_ids, mask)
    lengths = [input_ids.shape[1]] * input_ids.shape[0]
    if mask is not None:
        valid = mask.bool()
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            raise UserError("attention_mask: expected left padding, found padding after a token")
        lengths = valid.sum(-1).tolist()
    if 0 in lengths:
        raise UserError(f"prompt {lengths.index(0)} is empty: expected at least one token")
    context = context_length(model)
    if context is not None and max(lengths) > context:
        raise UserError(f"prompt of {max(lengths)} tokens: the model's context is {context}")
    return lengths
