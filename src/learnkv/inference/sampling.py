"""How the next tokens are chosen: greedily, drawn, or by beam search."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError, UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: greedily, or among the `top_k` likeliest that make up `top_p`."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seeded: bool = False
    """Whether a generator of its own draws, rather than the device's."""

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
    """Raise UserError where `positions` [B, T] lie behind the model's context.

    Args:
        slots: read or about to be read, and not counted by the cache yet.
    """
    context = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    reached = max(cache.prompt_lengths) + cache.continuation_length + slots
    # The bound counts padding; only where it is exceeded is the true number worth a host sync.
    if context is not None and reached > context and (reached := int(positions.max()) + 1) > context:
        raise UserError(f"{reached} tokens with the continuation: the model's context is {context}")


def check_numbers(logits: Tensor, step: int) -> None:
    """Raise RunError for NaN in the logits of a step."""
    if bool(logits.isnan().any()):
        raise RunError(f"the model's output is NaN after {step} new tokens")


def next_token(logits: Tensor, how: Sampling, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """The next token [B] from logits [B, V], and the largest logit [B], which is NaN where any is; no host sync."""
    if not how.do_sample:
        largest, token = logits.max(-1)
        return token, largest
    logits, order = (logits.float() / how.temperature).sort(dim=-1, descending=True)  # NaN comes first
    if how.top_k:
        logits[:, how.top_k :].fill_(-torch.inf)
    probabilities = logits.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= how.top_p
    # What torch.multinomial computes after it has looked at the probabilities, which a graph must not do.
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
    """transformers' beam search from left-padded questions [B, T]: [B, new]. The cache is left as it was."""
    beams = cache.fork()
    heard = cache.fork().extend_tail_mask(mask, padded=True)
    beams.batch_repeat_interleave(num_beams)

    def checked(said: Tensor, scores: Tensor) -> Tensor:
        check_numbers(scores, said.shape[1] - ids.shape[1])
        return scores

    output = model.generate(
        input_ids=ids,
        attention_mask=torch.cat([cache.prompt_mask.to(heard.device), heard], 1).long(),
        past_key_values=beams,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        eos_token_id=eos or None,
        pad_token_id=pad,
        logits_processor=[checked],
    )
    return output[:, ids.shape[1] :]
