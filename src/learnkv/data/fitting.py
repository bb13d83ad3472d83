"""Search for the number of units that fill a prompt to a length."""

from collections.abc import Callable
from typing import Any

from learnkv.data.sample import Draft
from learnkv.errors import UserError


def filled(
    task: str, draft: Callable[[int], Draft], tokenizer: Any, length: int, new_tokens: int, most: int | None = None
) -> Draft:
    """The draft with as many units as fit into `length` tokens with room for `new_tokens`.

    Args:
        task: for the error.
        draft: a prompt with so many units of filling.
        tokenizer: any Hugging Face tokenizer; it only counts.
        most: units that there are; None: any number.

    Raises:
        UserError: not even the prompt without filling fits.
    """
    units = largest_fitting(lambda n: prompt_tokens(tokenizer, draft(n)), length - new_tokens, most)
    if units is None:
        least = prompt_tokens(tokenizer, draft(0)) + new_tokens
        raise UserError(f"{task}: this prompt needs {least} tokens of this tokenizer, length is {length}")
    return draft(units)


def prompt_tokens(tokenizer: Any, draft: Draft) -> int:
    """Tokens of a prompt: context with the tokenizer's special tokens, the rest without."""
    after = tokenizer(draft.question + draft.answer_prefix, add_special_tokens=False)
    return len(tokenizer(draft.context)["input_ids"]) + len(after["input_ids"])


def largest_fitting(size: Callable[[int], int], limit: int, most: int | None = None) -> int | None:
    """Largest n >= 0 (and <= most) with size(n) <= limit, for a size that grows about linearly; None if not even 0.

    `size` costs a tokenisation, so the search interpolates and halves in turn instead of only halving.
    """
    low, low_size = 0, size(0)
    if low_size > limit:
        return None
    first_size, high, high_size, halve = low_size, None, 0, False
    while most is None or low < most:
        if high is None:
            slope = (low_size - first_size) / low if low else 0.0
            n = low + max(1, int((limit - low_size) / slope)) + 1 if slope else low + 16
            n = n if most is None else min(n, most)
        elif high - low <= 1:
            break
        else:
            share = 0.5 if halve else (limit - low_size) / (high_size - low_size)
            n = min(high - 1, max(low + 1, low + int(share * (high - low))))
            halve = not halve
        n_size = size(n)
        if n_size <= limit:
            low, low_size = n, n_size
        else:
            high, high_size = n, n_size
    return low
