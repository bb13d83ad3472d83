"""How the next tokens are chosen: greedily, drawn, or by beam search."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from learnkv.cache import CompressedCache
from learnkv.errors import RunError, UserError


def check_settings(
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    num_beams: int,
    stop: Callable[[Tensor], Tensor] | None,
) -> None:
    """Raise UserError for values out of range and for combinations that would be ignored."""
    if max_new_tokens < 1 or num_beams < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} num_beams={num_beams}: expected at least 1 of each")
    if not temperature > 0 or not 0 < top_p <= 1 or top_k < 0:
        raise UserError(
            f"temperature={temperature:g} top_p={top_p:g} top_k={top_k}: expected temperature > 0, 0 < top_p <= 1, "
            "top_k >= 0 (0: all tokens)"
        )
    if num_beams > 1 and (do_sample or stop is not None):
        raise UserError(f"num_beams={num_beams}: beam search does not go with do_sample or stop")


def check_numbers(logits: Tensor, step: int) -> None:
    """Raise RunError for NaN in the logits of a step."""
    if bool(logits.isnan().any()):
        raise RunError(f"the model's output is NaN after {step} new tokens")


def next_token(
    logits: Tensor, do_sample: bool, temperature: float, top_k: int, top_p: float, generator: torch.Generator | None
) -> Tensor:
    """The next token [B] from logits [B, V]: the likeliest, or one drawn among the `top_k` that make up `top_p`."""
    if not do_sample:
        return logits.argmax(-1)
    logits, order = (logits.float() / temperature).sort(dim=-1, descending=True)
    if top_k:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    drawn = torch.multinomial(probabilities.masked_fill(outside, 0), 1, generator=generator)
    return order.gather(1, drawn)[:, 0]


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
    heard = cache.fork().extend_tail_mask(mask)
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
