"""Choice of the next tokens: greedy, sampled, or by beam search."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError, UserError
from learnkv.inference.models import context_length


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or sampling among the `top_k` most likely tokens that make up `top_p`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seeded: bool = False
    """Whether to sample with a generator of the loop instead of the device's."""

    def __post_init__(self) -> None:
        if not self.temperature > 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise UserError(
                f"temperature={self.temperature:g} top_p={self.top_p:g} top_k={self.top_k}: expected temperature > 0, "
                "0 < top_p <= 1, top_k >= 0 (0: all tokens)"
            )


def check_settings(
    max_new_tokens: int, do_sample: bool, num_beams: int, stop: Callable[[Tensor], Tensor] | None
) -> None:
    """Raise UserError for values out of range and for combinations that would be ignored."""
    if max_new_tokens < 1 or num_beams < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} num_beams={num_beams}: expected at least 1 of each")
    if num_beams > 1 and (do_sample or stop is not None):
        raise UserError(f"num_beams={num_beams}: beam search does not go with do_sample or stop")


def check_context(model: PreTrainedModel, cache: CompressedCache, positions: Tensor, slots: int) -> None:
    """Raise UserError where `positions` [B, T] exceed the model's context.

    Args:
        slots: slots that the cache does not count yet.
    """
    context = context_length(model)
    reached = max(cache.prompt_lengths) + cache.continuation_length + slots
    # The bound counts padding; the true number costs a host sync.
    if context is not None and reached > context and (reached := int(positions.max()) + 1) > context:
        raise UserError(f"{reached} tokens with the continuation: the model's context is {context}")


def check_numbers(logits: Tensor, step: int) -> None:
    """Raise RunError for NaN in the logits of a step."""
    if bool(logits.isnan().any()):
        raise RunError(f"the model's output is NaN after {step} new tokens")


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The next token [B] from logits [B, V], and the largest logit [B], which is NaN where any is; no host sync."""
    if not sampling.do_sample:
        largest, token = logits.max(-1)
        return token, largest
    logits, order = (logits.float() / sampling.temperature).sort(dim=-1, descending=True)  # NaN comes first
    if sampling.top_k:
        logits[:, sampling.top_k :].fill_(-torch.inf)
    probabilities = logits.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    # As torch.multinomial, which also checks the probabilities on the host; a CUDA graph cannot.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    drawn = (probabilities.masked_fill(outside, 0) / noise).argmax(-1, keepdim=True)
    return order.gather(1, drawn)[:, 0], logits[:, 0]


def beam_search(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: CompressedCache,
    max_new_tokens: int,
    num_beams: int,
    eos: list[int],
    pad: int,
) -> Tensor:
    """transformers' beam search from left-padded questions [B, T]: [B, new]. The cache does not change."""
    beams = cache.fork()
    tail_mask = cache.fork().extend_tail_mask(mask, padded=True)
    beams.batch_repeat_interleave(num_beams)

    def checked(all_ids: Tensor, scores: Tensor) -> Tensor:
        check_numbers(scores, all_ids.shape[1] - ids.shape[1])
        return scores

    output = model.generate(
        input_ids=ids,
        attention_mask=torch.cat([cache.prompt_mask.to(tail_mask.device), tail_mask], 1).long(),
        past_key_values=beams,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
        eos_token_id=eos or None,
        pad_token_id=pad,
        logits_processor=[checked],
    )
    return output[:, ids.shape[1] :]
