"""Needle trials: a context, a question, its answer, and where in the context it stands."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learnkv.data.retrieval import Retrieval
from learnkv.errors import UserError
from learnkv.inference.models import format_prompt

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
    """First and last but one token of the sentence in the context that holds the answer."""


def draw(tokenizer: Any, length: int, count: int, seed: int = 0) -> Iterator[Trial]:
    """`count` trials in contexts of at most `length` tokens: one sentence to find among others of the same wording.

    They come from the training episodes: nothing that evaluation draws is in them. The sentences that were not asked
    for differ from the needle in key and value only, so that a head has to choose by the question's key.
    """
    if not tokenizer.is_fast:
        raise UserError("model=: its tokenizer does not tell where tokens stand in a text, expected a fast one")
    kinds = {"needle": 1.0, "crowd": 1.0}
    retrieval = Retrieval(
        length, lambda text: len(tokenizer(text).input_ids), seed=seed, kinds=kinds, continuations=CONTINUATIONS
    )
    drawn = index = 0
    while drawn < count:
        episode = retrieval.episode(index)
        index += 1
        for question, answer in episode.continuations[: count - drawn]:
            drawn += 1
            yield _trial(tokenizer, episode.context, question, answer)


def _trial(tokenizer: Any, context: str, question: str, answer: str) -> Trial:
    # A question ends in the words before the value: its longest end that the context has is the needle's sentence.
    at = next(at for at in range(len(question)) if question[at:] + answer in context)
    stem = question[at:] if tokenizer.chat_template is None else question[at:].lstrip()
    told, asked, begun = format_prompt(tokenizer, context, question[:at], stem)
    words = tokenizer(told, add_special_tokens=False, return_offsets_mapping=True)
    sentence = (question[at:] + answer).strip()
    begin, end = told.index(sentence), told.index(sentence) + len(sentence)
    inside = [at for at, (first, last) in enumerate(words.offset_mapping) if last > begin and first < end]

    def ids(text: str) -> Tensor:
        return torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], dtype=torch.long)

    return Trial(torch.tensor([words.input_ids]), ids(asked + begun), ids(answer), answer, (inside[0], inside[-1] + 1))
