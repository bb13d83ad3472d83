"""Needle trials: a context, a question, its answer, and the answer's position in the context."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnkv.data.retrieval import Retrieval
from learnkv.errors import UserError
from learnkv.inference.prompt_format import format_prompt

CONTINUATIONS = 2


@dataclass(frozen=True)
class Trial:
    """One question about a context, as token ids."""

    context: Tensor
    """[1, S]."""
    question: Tensor
    """[1, T], read after the context."""
    answer: Tensor
    """[1, A]."""
    text: str
    """The answer as text."""
    needle: tuple[int, int]
    """Token range [first, last) of the sentence with the answer in the context."""


def sample_trials(tokenizer: Any, length: int, count: int, seed: int = 0) -> Iterator[Trial]:
    """`count` trials in contexts of at most `length` tokens: one sentence to find among others of the same wording.

    They come from the training episodes and share nothing with evaluation. The other sentences differ from the needle
    in key and value only, so that a head has to select by the question's key.
    """
    if not tokenizer.is_fast:
        raise UserError("model=: expected a model with a fast tokenizer, which has the positions of tokens in a text")
    kinds = {"needle": 1.0, "crowd": 1.0}
    retrieval = Retrieval(
        length, lambda text: len(tokenizer(text).input_ids), seed=seed, kinds=kinds, continuations=CONTINUATIONS
    )
    sampled = index = 0
    while sampled < count:
        episode = retrieval.episode(index)
        index += 1
        for question, answer in episode.continuations[: count - sampled]:
            sampled += 1
            yield _trial(tokenizer, episode.context, question, answer)


def _trial(tokenizer: Any, context: str, question: str, answer: str) -> Trial:
    # A question ends in the words before the value: its longest suffix in the context is the needle's sentence.
    split = next(index for index in range(len(question)) if question[index:] + answer in context)
    stem = question[split:] if tokenizer.chat_template is None else question[split:].lstrip()
    prompt, formatted, prefix = format_prompt(tokenizer, context, question[:split], stem)
    tokens = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)
    sentence = (question[split:] + answer).strip()
    begin = prompt.index(sentence)
    end = begin + len(sentence)
    needle = [index for index, (first, last) in enumerate(tokens.offset_mapping) if last > begin and first < end]

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], dtype=torch.long)

    context_ids = torch.tensor([tokens.input_ids])
    return Trial(context_ids, ids(formatted + prefix), ids(answer), answer, (needle[0], needle[-1] + 1))
