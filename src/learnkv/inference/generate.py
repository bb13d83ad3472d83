"""Continuing from the kept entries of a prompt: logits of given tokens, and generation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteriaList

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.inference.attention import attach
from learnkv.inference.beam_search import beam_search
from learnkv.inference.decode_loop import decode_loop_for
from learnkv.inference.generation_settings import generation_config, special_tokens
from learnkv.inference.sampling import check_context, either, sampling_of, stop_condition
from learnkv.inference.token_ids import (
    Sequence,
    check_ids,
    check_mask,
    record_ids,
    refuse_gaps,
    refuse_unknown_ids,
    right_padded,
    sequence_with,
)


def continuation(
    model: PreTrainedModel, input_ids: Tensor, cache: CompressedCache, attention_mask: Tensor | None = None
) -> Tensor:
    """Logits [B, T, V] of tokens read after the prompt; they are appended to the cache's tail.

    Gradients flow where they are enabled.

    Args:
        input_ids: [B, T] continuations, right-padded where their lengths differ.
        attention_mask: [B, T] 1 for tokens, 0 for padding; None: no padding.
    """
    return _continue(model, input_ids, cache, attention_mask)[0]


def continuation_states(
    model: PreTrainedModel, input_ids: Tensor, cache: CompressedCache, attention_mask: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, T, V] as of `continuation`, and hidden states [B, T, E] after every layer, the last normalised."""
    return _continue(model, input_ids, cache, attention_mask, hidden=True)


def _continue(
    model: PreTrainedModel, input_ids: Tensor, cache: CompressedCache, mask: Tensor | None, hidden: bool = False
) -> tuple[Tensor, list[Tensor]]:
    ids, mask, padded = _with_pending(*_check_continuation(model, input_ids, mask, cache), cache)
    outputs = read(model, ids, mask, padded, cache, hidden=hidden)
    begin = ids.shape[1] - input_ids.shape[1]
    states = outputs.hidden_states[1:] if hidden else ()
    return outputs.logits[:, begin:], [state[:, begin:] for state in states]


def _check_continuation(
    model: PreTrainedModel, ids: Tensor, mask: Tensor | None, cache: CompressedCache
) -> tuple[Tensor, Tensor, bool]:
    """Ids [B, T], which of them are tokens [B, T], and whether any is padding."""
    if not isinstance(cache, CompressedCache):
        raise UserError(f"expected a CompressedCache, as prefill returns it, got {type(cache).__name__}")
    cache.seal()
    check_ids(ids, model)
    check_mask(ids, mask)
    if ids.shape[0] != len(cache.prompt_lengths):
        raise UserError(
            f"{ids.shape[0]} rows continue {len(cache.prompt_lengths)} prompts: repeat the cache's rows first"
        )
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool), False
    return ids, mask.bool(), not bool(mask.all())


def _with_pending(ids: Tensor, mask: Tensor, padded: bool, cache: CompressedCache) -> tuple[Tensor, Tensor, bool]:
    """Put tokens of the last turn that the model has not read in front."""
    if cache.pending is not None:
        unread, is_token = cache.pending
        ids, mask = torch.cat([unread, ids], 1), torch.cat([is_token, mask], 1)
        padded = padded or not bool(is_token.all())
        cache.pending = None
    return ids, mask, padded


def read(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    padded: bool,
    cache: CompressedCache,
    logits_to_keep: int = 0,
    hidden: bool = False,
) -> Any:
    """The model's output for ids [B, T], which are tokens where `mask` [B, T]; the cache has read them then.

    Args:
        logits_to_keep: logits of so many last slots only; 0: of all.
        hidden: hidden states, too.
    """
    attach(model)
    positions = cache.next_positions().to(ids.device).unsqueeze(-1) + (mask.cumsum(-1) - 1).clamp_min(0)
    check_context(model, cache, positions, ids.shape[1])
    record_ids(cache, ids)
    tail = cache.extend_tail_mask(mask, padded)
    return model(
        input_ids=ids,
        attention_mask=_attention_mask(cache, tail, ids.shape[1]),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=logits_to_keep,
        output_hidden_states=hidden,
    )


def _attention_mask(cache: CompressedCache, tail: Tensor, new: int) -> Tensor | None:
    """Mask [B, 1, T, M] of the tail, None without padding; of prompt and tail [B, S + M] in a hybrid model."""
    if cache.is_hybrid:
        mask = torch.cat([cache.prompt_mask.to(tail.device), tail], 1)
        refuse_gaps(cache, mask)
        return mask
    if not cache.tail_padded:
        return None
    tail = tail[:, cache.continuation_length - cache.tail_length :]
    slot = torch.arange(tail.shape[1], device=tail.device)
    query_slot = slot[tail.shape[1] - new :].unsqueeze(-1)
    # A padded query attends to itself, so that its softmax is over something.
    return (((slot <= query_slot) & tail.unsqueeze(1)) | (slot == query_slot)).unsqueeze(1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool | None = None,
    num_beams: int | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int | None = None,
    graph: bool | None = None,
    earlier: int = 0,
    **settings: Any,
) -> Tensor:
    """Continue every prompt with `input_ids` and generate up to `max_new_tokens` tokens: [B, new].

    The cache keeps the generated tokens, so that a further call is the next turn of a conversation. Tokens are those of
    transformers' own `generate()` with the same settings, and the prompt counts for penalties. Settings that are not
    given here are those of the model's generation config, then transformers' defaults; what is not supported is refused
    by name. There is a host sync every 16 steps, to check whether all rows have ended; tokens read after that are
    dropped. A cache of a hybrid model, or with online eviction, cannot be cropped and is checked every step.

    Args:
        input_ids: [B, T] the question, left- or right-padded where lengths differ.
        attention_mask: [B, T] 1 for tokens, 0 for padding; None: no padding.
        do_sample: sample; otherwise greedy, whatever the model's generation config has. `seed` makes it repeatable.
        num_beams: beam search over as many beams, by transformers' own search; not with sampling or `stop`.
        eos_token_id: ends a row; None: that of the model's generation config. Rows that ended are padded.
        stop: called with the new tokens [B, new] after every step, True [B] ends a row. A result on the host takes
            effect at once; one on a device costs no host sync.
        tokenizer: needed for stop strings.
        graph: capture the step as a CUDA graph; None: wherever `cuda_graph.refusal` and the settings allow.
        earlier: how many of the last tokens of the cache and `input_ids` this turn generated in an earlier call.
        settings: any of transformers' GenerationConfig, such as `temperature` or `repetition_penalty`.

    Raises:
        RunError: NaN in the model's output, checked in the first, every 16th and the last step.
    """
    chosen = {"num_beams": num_beams, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    given = {name: value for name, value in chosen.items() if value is not None}
    config = generation_config(model, {**settings, **given, "max_new_tokens": max_new_tokens, "do_sample": do_sample})
    criteria = stop_condition(config, stop, tokenizer)
    ids, mask, padded, sequence = question_of(model, input_ids, attention_mask, cache, config, criteria)
    if config.num_beams > 1:
        return beam_search(model, ids, mask, cache, config, sequence, earlier)
    sampling = sampling_of(model, config, sequence, ids.device, earlier, seeded=config.do_sample and seed is not None)
    logits = last_logits(model, ids, mask, padded, cache)
    loop = decode_loop_for(model, cache, max_new_tokens, sampling, *special_tokens(config), graph)
    return loop.run(cache, logits, max_new_tokens, either(stop, criteria, sequence), seed, sequence)


def question_of(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cache: CompressedCache,
    config: GenerationConfig,
    criteria: StoppingCriteriaList | None,
) -> tuple[Tensor, Tensor, bool, Sequence | None]:
    """Ids [B, T] to read, which are tokens [B, T], whether any is padding; all tokens so far, where they are read."""
    ids, mask, padded = _check_continuation(model, input_ids, attention_mask, cache)
    if padded and not bool(mask.any(-1).all()):
        raise UserError("empty question: expected at least one token in every row")
    reader = sampling_of(model, config, None, ids.device).reads_tokens or (criteria and "stop_strings or max_time")
    if reader:
        refuse_unknown_ids(cache, reader)
    ids, mask, padded = _with_pending(ids, mask, padded, cache)
    attach(model)
    return ids, mask, padded, sequence_with(cache, ids, mask) if reader else None


def last_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, padded: bool, cache: CompressedCache) -> Tensor:
    """Logits [B, V] of the last token of every row of ids [B, T]."""
    if not padded:
        last: Tensor = read(model, ids, mask, padded, cache, logits_to_keep=1).logits[:, -1]
        return last
    ids, mask = right_padded(ids, mask)
    logits: Tensor = read(model, ids, mask, padded, cache).logits
    return logits.gather(1, (mask.sum(-1) - 1).view(-1, 1, 1).expand(-1, 1, logits.shape[-1]))[:, 0]
