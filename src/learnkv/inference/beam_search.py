"""Beam search over a compressed cache, by transformers' own search."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.inference.generation_settings import search_only, special_tokens
from learnkv.inference.sampling import check_numbers, sampling_of
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
    ends, pad = special_tokens(config)
    result = _search(model, *left_padded(ids, mask), cache, config, sequence, earlier)
    is_end = torch.isin(result, torch.tensor(ends, device=result.device, dtype=result.dtype))
    after_end = is_end.cumsum(-1) - is_end.long() > 0
    cache.pending = (torch.cat([ids, result], 1), torch.cat([mask, ~after_end], 1))
    return result.masked_fill(after_end, pad)  # transformers takes another id for a pad_token_id of 0


def _search(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    cache: CompressedCache,
    config: GenerationConfig,
    sequence: Sequence | None,
    earlier: int,
) -> Tensor:
    """The best sequences [B, new] after left-padded questions [B, T]. The cache does not change."""
    sampling = sampling_of(model, config, sequence and _repeated(sequence, config.num_beams), ids.device, earlier)
    beams = cache.fork()
    beams.token_ids = None  # rows are selected at every step
    tail_mask = cache.fork().extend_tail_mask(mask, padded=True)
    beams.batch_repeat_interleave(config.num_beams)

    process: Callable[[Tensor, Tensor], Tensor] = sampling.processors

    def processed(all_ids: Tensor, scores: Tensor) -> Tensor:
        check_numbers(scores, all_ids.shape[1] - ids.shape[1])
        if sequence is None:
            return process(all_ids, scores)
        before = sequence.ids.repeat_interleave(len(all_ids) // len(ids), 0)
        return process(torch.cat([before, all_ids[:, ids.shape[1] :]], 1), scores)

    output: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.cat([cache.prompt_mask.to(tail_mask.device), tail_mask], 1).long(),
        past_key_values=beams,
        logits_processor=[processed],
        **search_only(config),
    )
    return output[:, ids.shape[1] :]


def _repeated(sequence: Sequence, beams: int) -> Sequence:
    """The sequence whose padding is that of every beam; its ids are those of the rows, as transformers passes them."""
    mask = sequence.mask
    return Sequence(sequence.ids, None if mask is None else mask.repeat_interleave(beams, 0))
