"""Choice of the next tokens from logits: greedy or sampled, after transformers' logits processors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation import MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError, UserError
from learnkv.inference.generation_settings import special_tokens
from learnkv.inference.models import context_length
from learnkv.inference.token_ids import Sequence
from learnkv.ops.device import upload

_CAPTURABLE = {
    "TemperatureLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "MinPLogitsWarper",
    "TypicalLogitsWarper",
    "EpsilonLogitsWarper",
    "LogitNormalization",
}
"""Processors that read the logits only and repeat the same operations at every step."""

_READ_LOGITS_ONLY = _CAPTURABLE | {
    "EtaLogitsWarper",
    "TopHLogitsWarper",
    "SuppressTokensLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
}


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or sampling, from processed logits."""

    do_sample: bool = False
    seeded: bool = False
    """Whether to sample with a generator of the loop instead of the device's."""
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList, compare=False)
    settings: tuple[Any, ...] = ()
    """What capturable processors compute from, to compare two turns."""

    @property
    def reads_tokens(self) -> str | None:
        """Name of a processor that reads the tokens before, or their number; None: there is none."""
        names = [type(processor).__name__ for processor in self.processors]
        return next((name for name in names if name not in _READ_LOGITS_ONLY), None)

    @property
    def refusal(self) -> str | None:
        """Why a step with these processors cannot be captured as a CUDA graph; None where it can."""
        names = [type(processor).__name__ for processor in self.processors]
        other = [name for name in names if name not in _CAPTURABLE]
        return f"{other[0]} decides on the host" if other else None


def sampling_of(
    model: PreTrainedModel,
    config: GenerationConfig,
    sequence: Sequence | None,
    device: torch.device,
    earlier: int = 0,
    seeded: bool = False,
) -> Sampling:
    """Transformers' logits processors for a generation config.

    Args:
        sequence: the tokens before the first new one; None: not known, for processors that do not read them.
        earlier: last tokens of the sequence that count as new ones.

    Raises:
        UserError: for a value that transformers refuses.
    """
    length = 1 if sequence is None else sequence.ids.shape[1] - earlier
    ends, _ = special_tokens(config)
    config._eos_token_tensor = upload(ends, device, torch.long) if ends else None
    config.max_length = length + earlier + config.max_new_tokens
    if config.min_new_tokens is not None:
        config.min_length = config.min_new_tokens + length
    prompt = torch.zeros(1, 1, dtype=torch.long, device=device) if sequence is None else sequence.ids[:, :length]
    reads_encoder = (config.encoder_repetition_penalty or 1) != 1 or config.encoder_no_repeat_ngram_size
    try:
        processors = model._get_logits_processor(
            generation_config=config,
            input_ids_seq_length=length,
            encoder_input_ids=prompt if reads_encoder else None,
            logits_processor=LogitsProcessorList(),
            device=device,
            model_kwargs={"attention_mask": None if sequence is None else sequence.mask},
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"generation config: {' '.join(str(error).split())}") from None
    settings = tuple((type(part).__name__, *sorted(_numbers(part).items())) for part in processors)
    return Sampling(config.do_sample, seeded, processors, settings)


def _numbers(processor: object) -> dict[str, Any]:
    return {name: value for name, value in vars(processor).items() if isinstance(value, int | float)}


def stop_condition(
    config: GenerationConfig, stop: Callable[[Tensor], Tensor] | None, tokenizer: Any
) -> StoppingCriteriaList | None:
    """Transformers' criteria for stop strings and a time limit; None without either.

    Raises:
        UserError: for stop strings without a tokenizer, and for beam search with sampling or anything that stops it.
    """
    wanted = [name for name in ("stop_strings", "max_time") if getattr(config, name) is not None]
    if config.num_beams > 1 and (config.do_sample or stop is not None or wanted):
        other = wanted[0] if wanted else "do_sample or stop"
        raise UserError(f"num_beams={config.num_beams}: beam search does not go with {other}")
    criteria = StoppingCriteriaList()
    if config.stop_strings is not None:
        if tokenizer is None:
            raise UserError(f"stop_strings={config.stop_strings!r}: expected tokenizer=, the model's tokenizer")
        try:
            criteria.append(StopStringCriteria(tokenizer, config.stop_strings))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"stop_strings={config.stop_strings!r}: {' '.join(str(error).split())}") from None
    if config.max_time is not None:
        criteria.append(MaxTimeCriteria(config.max_time))
    return criteria if wanted else None


def either(
    stop: Callable[[Tensor], Tensor] | None, criteria: StoppingCriteriaList | None, sequence: Sequence | None
) -> Callable[[Tensor], Tensor] | None:
    """`stop` of new tokens [B, new] -> [B], or `criteria` of all tokens, whichever ends a row first."""
    if criteria is None or sequence is None:
        return stop

    def stops(new: Tensor) -> Tensor:
        ended: Tensor = criteria(torch.cat([sequence.ids, new], 1), None)
        if stop is None:
            return ended
        return ended | stop(new).to(ended.device)

    return stops


def check_context(model: PreTrainedModel, cache: CompressedCache, positions: Tensor, slots: int) -> None:
    """Raise UserError where `positions` [B, T] exceed the model's context, and announce them to the pass that follows.

    Args:
        slots: slots that the cache does not count yet.
    """
    context = context_length(model)
    reached = max(cache.prompt_lengths) + cache.continuation_length + slots
    cache.expected_pass = positions, reached
    # The bound counts padding; the true number costs a host sync.
    if context is not None and reached > context and (reached := int(positions.max()) + 1) > context:
        raise UserError(f"{reached} tokens with the continuation: the model's context is {context}")


def check_numbers(logits: Tensor, step: int) -> None:
    """Raise RunError for NaN in the logits of a step."""
    if bool(logits.isnan().any()):
        raise RunError(f"the model's output is NaN after {step} new tokens")


def next_token(
    logits: Tensor, sampling: Sampling, generator: torch.Generator | None, tokens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The next token [B], and a number [B] that is NaN where the logits have NaN or no token is left; no host sync.

    Args:
        logits: [B, V].
        tokens: [B, T] all tokens before, for processors that read them.
    """
    largest, token = logits.max(-1)
    if not sampling.do_sample and not sampling.processors:
        return token, largest
    scores = processed(logits, sampling, tokens)
    if not sampling.do_sample:
        return scores.argmax(-1), largest
    probabilities = scores.softmax(-1)
    drawn = draw(probabilities, generator)
    return drawn, torch.where(probabilities[:, 0].isnan(), torch.nan, largest)


def processed(logits: Tensor, sampling: Sampling, tokens: Tensor | None = None) -> Tensor:
    """Logits [B, V] after the processors, in float32.

    Args:
        tokens: [B, T] all tokens before, for processors that read them.
    """
    with _FillsByScalars():
        scores: Tensor = sampling.processors(tokens, logits.to(torch.float32, copy=True))
    return scores


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """A token [B] of each row's probabilities [B, V], which need not sum to 1; no host sync."""
    # As torch.multinomial, which also checks the probabilities on the host; a CUDA graph cannot.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return (probabilities / noise).argmax(-1)


class _FillsByScalars(TorchFunctionMode):
    """Lets `tensor[index] = number` fill without a tensor made on the host, which a CUDA graph cannot repeat."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__setitem__ and _is_view(args[1]) and isinstance(args[2], int | float):
            args[0][args[1]].fill_(args[2])
            return None
        return func(*args, **(kwargs or {}))


def _is_view(index: Any) -> bool:
    """Whether a tensor at this index shares the tensor's memory."""
    return isinstance(index, tuple) and all(isinstance(part, slice | EllipsisType) for part in index)
