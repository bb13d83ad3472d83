"""Beam search over a compressed cache, by transformers' own search."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generation_settings import search_only, special_tokens
from learnkv.inference.sampling import Sampling, check_numbers, sampling_of
from learnkv.inference.token_ids import Sequence, left_padded


def beam_search(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: CompressedCache,
    config: GenerationConfig,
    sequence: Sequence | None,
    earlier: int,
) -> Tensor:
    """Beam search from questions [B, T]: [B, new]. The cache gets question and result as pending tokens.

    Args:
        sequence: all tokens up to the questions' ends, where processors read them.
        earlier: last tokens of the sequence that count as new ones.
    """
    cache.refuse_invalid()
    repeated = sequence and _repeated(sequence, config.num_beams)
    sampling = sampling_of(model, config, repeated, ids.device, earlier)
    question, is_token = left_padded(ids, mask)
    output: Tensor = model.generate(
        input_ids=question,
        attention_mask=_whole_mask(cache, is_token),
        past_key_values=_beams(cache, config.num_beams),
        logits_processor=[_processor(sampling, question.shape[1], sequence, config.num_beams)],
        **search_only(config),
    )
    result = output[:, question.shape[1] :]
    ends, pad = special_tokens(config)
    is_end = torch.isin(result, torch.tensor(ends, device=result.device, dtype=result.dtype))
    after_end = is_end.cumsum(-1) - is_end.long() > 0
    cache.pending = (torch.cat([ids, result], 1), torch.cat([mask, ~after_end], 1))
    return result.masked_fill(after_end, pad)  # transformers takes another id for a pad_token_id of 0


def _repeated(sequence: Sequence, beams: int) -> Sequence:
    """The sequence whose padding is that of every beam; its ids are those of the rows, as transformers passes them."""
    mask = sequence.mask
    return Sequence(sequence.ids, None if mask is None else mask.repeat_interleave(beams, 0))


def _whole_mask(cache: CompressedCache, is_token: Tensor) -> Tensor:
    """Mask [B, S + T] of a cache and a left-padded question, which is tokens where `is_token` [B, T]."""
    tail_mask = cache.fork().extend_tail_mask(is_token, padded=True)
    return torch.cat([cache.prompt_mask.to(tail_mask.device), tail_mask], 1).long()


def _beams(cache: CompressedCache, beams: int) -> CompressedCache:
    """A fork with as many copies of every row; its token ids are forgotten, as rows are selected at every step."""
    fork = cache.fork()
    fork.token_ids = None
    fork.batch_repeat_interleave(beams)
    return fork


def _processor(
    sampling: Sampling, question: int, sequence: Sequence | None, beams: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Scores [B * beams, V] after the processors, which read `sequence` in place of the first `question` ids."""
    process: Callable[[Tensor, Tensor], Tensor] = sampling.processors
    before = None if sequence is None else sequence.ids.repeat_interleave(beams, 0)

    def processed(ids: Tensor, scores: Tensor) -> Tensor:
        check_numbers(scores, ids.shape[1] - question)
        return process(ids if before is None else torch.cat([before, ids[:, question:]], 1), scores)

    return processed
