"""Reading a prompt once, continuing from what is retained of it, and generating."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import UserError
from learnkv.inference.attention import attach
from learnkv.inference.decode_loop import steps_for
from learnkv.inference.sampling import Sampling, beam_search, check_context, check_settings


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
    """As `continuation`: the logits [B, T, V], and hidden states [B, T, E] after every layer, the last normalised."""
    return _continue(model, input_ids, cache, attention_mask, hidden=True)


def _continue(
    model: PreTrainedModel, input_ids: Tensor, cache: CompressedCache, mask: Tensor | None, hidden: bool = False
) -> tuple[Tensor, list[Tensor]]:
    ids, mask, padded = _with_pending(*_check_continuation(input_ids, mask, cache), cache)
    said = _read(model, ids, mask, padded, cache, hidden=hidden)
    begin = ids.shape[1] - input_ids.shape[1]
    return said.logits[:, begin:], [state[:, begin:] for state in said.hidden_states[1:]] if hidden else []


def _check_continuation(ids: Tensor, mask: Tensor | None, cache: CompressedCache) -> tuple[Tensor, Tensor, bool]:
    """Tokens [B, T], which of them count [B, T], and whether any does not."""
    if not isinstance(cache, CompressedCache):
        raise UserError(f"expected a CompressedCache, as prefill returns it, got {type(cache).__name__}")
    cache.seal()
    if ids.ndim != 2 or ids.numel() == 0:
        raise UserError(f"input_ids of shape {list(ids.shape)}: expected [batch, tokens] with at least one token")
    if mask is not None and mask.shape != ids.shape:
        raise UserError(f"attention_mask of shape {list(mask.shape)}: expected {list(ids.shape)}, as input_ids")
    if ids.shape[0] != len(cache.prompt_lengths):
        raise UserError(
            f"{ids.shape[0]} rows continue {len(cache.prompt_lengths)} prompts: repeat the cache's rows first"
        )
    if mask is None:
        return ids, torch.ones_like(ids, dtype=torch.bool), False
    return ids, mask.bool(), not bool(mask.all())


def _with_pending(ids: Tensor, mask: Tensor, padded: bool, cache: CompressedCache) -> tuple[Tensor, Tensor, bool]:
    """Put what was said in the turn before and the model has not read yet in front."""
    if cache.pending is not None:
        unread, said = cache.pending
        ids, mask, padded = torch.cat([unread, ids], 1), torch.cat([said, mask], 1), padded or not bool(said.all())
        cache.pending = None
    return ids, mask, padded


def _read(
    model: PreTrainedModel,
    ids: Tensor,
    new: Tensor,
    padded: bool,
    cache: CompressedCache,
    last: int = 0,
    hidden: bool = False,
) -> Any:
    """The model's output, with logits [B, T, V] of tokens [B, T], of which those count that are `new` [B, T].

    Logits of the `last` tokens only, 0: of all; hidden states if asked for.
    """
    attach(model)
    positions = cache.next_positions().to(ids.device).unsqueeze(-1) + (new.cumsum(-1) - 1).clamp_min(0)
    check_context(model, cache, positions, ids.shape[1])
    tail = cache.extend_tail_mask(new, padded)
    return model(
        input_ids=ids,
        attention_mask=_forward_mask(cache, tail, ids.shape[1]),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
        output_hidden_states=hidden,
    )


def _forward_mask(cache: CompressedCache, tail: Tensor, new: int) -> Tensor | None:
    """What the model is told of padding: nothing where the tail has none, else a mask of the tail only."""
    if cache.has_sliding_layers:
        seen = torch.cat([cache.prompt_mask.to(tail.device), tail], 1)
        cache.refuse_gaps(seen)
        return seen
    if not cache.tail_padded:
        return None
    tail = tail[:, cache.continuation_length - cache.tail_length :]
    slot = torch.arange(tail.shape[1], device=tail.device)
    causal = slot <= slot[tail.shape[1] - new :].unsqueeze(-1)
    # A padded query sees itself, so that its softmax is over something.
    itself = slot == slot[tail.shape[1] - new :].unsqueeze(-1)
    return ((causal & tail.unsqueeze(1)) | itself).unsqueeze(1)


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: CompressedCache,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_beams: int = 1,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    stop: Callable[[Tensor], Tensor] | None = None,
    seed: int | None = None,
    graph: bool | None = None,
) -> Tensor:
    """Continue every prompt with `input_ids` and generate up to `max_new_tokens` tokens: [B, new].

    The cache remembers what was said, so that a further call is the next turn of a conversation. Tokens are the same as
    those of transformers' own `generate()`; steps wait for nothing between the looks, every 16 steps, whether all rows
    have ended. What was read beyond the end is forgotten. A cache that cannot forget, one with sliding layers or one
    that evicts again while tokens are added, is looked at every step.

    Args:
        input_ids: [B, T] the question, left- or right-padded where lengths differ.
        attention_mask: [B, T] 1 for tokens, 0 for padding; None: no padding.
        do_sample, temperature, top_k, top_p: sampling; greedy otherwise. `seed` makes it repeatable.
        num_beams: beam search over as many beams, by transformers' own search; not with sampling or `stop`.
        eos_token_id: ends a row; None: what the model's generation config says. Rows that ended are padded.
        stop: called with the new tokens [B, new] after every step, True [B] ends a row. An answer on the host is acted
            on at once, one on a device is not waited for: no more of a sync than `stop` itself makes.
        graph: capture the step as a CUDA graph; None: where `cuda_graph.refusal` has nothing against it.

    Raises:
        RunError: NaN in the model's output, looked for in the first, every 16th and the last step.
    """
    check_settings(max_new_tokens, do_sample, num_beams, stop)
    sampling = Sampling(do_sample, temperature, top_k, top_p, seeded=do_sample and seed is not None)
    settings = model.generation_config
    eos = eos_token_id if eos_token_id is not None else settings.eos_token_id
    ends = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    pad = pad_token_id if pad_token_id is not None else settings.pad_token_id
    pad = pad if pad is not None else (ends[0] if ends else 0)
    ids, mask, padded = _check_continuation(input_ids, attention_mask, cache)
    if padded and not bool(mask.any(-1).all()):
        raise UserError("empty question: expected at least one token in every row")
    ids, mask, padded = _with_pending(ids, mask, padded, cache)
    if num_beams > 1:
        attach(model)
        found = beam_search(model, *_packed(ids, mask, "left"), cache, max_new_tokens, num_beams, list(ends), pad)
        over = _ended(found, ends).cumsum(-1) - _ended(found, ends).long() > 0
        cache.pending = (torch.cat([ids, found], 1), torch.cat([mask, ~over], 1))
        return found.masked_fill(over, pad)  # transformers takes another id for a pad_token_id of 0
    if padded:
        ids, mask = _packed(ids, mask, "right")
    logits = _read(model, ids, mask, padded, cache, last=0 if padded else 1).logits
    if padded:
        logits = logits.gather(1, (mask.sum(-1) - 1).view(-1, 1, 1).expand(-1, 1, logits.shape[-1]))
    return steps_for(model, cache, max_new_tokens, sampling, ends, pad, graph).turn(
        cache, logits[:, -1], max_new_tokens, stop, seed
    )


def _ended(ids: Tensor, ends: tuple[int, ...]) -> Tensor:
    """Where an end of a row stands."""
    return torch.isin(ids, torch.tensor(ends, device=ids.device, dtype=ids.dtype))


def _packed(ids: Tensor, mask: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """The same rows with all their padding on one side."""
    order = (mask if side == "left" else ~mask).to(torch.int8).argsort(dim=-1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)
