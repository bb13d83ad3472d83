"""Batches of prompts, packed by their tokens, and halved where memory is short."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from learnkv.evaluation.tasks.base import Prompt

DEFAULT_TOKENS = 16384
FAILED_ALLOCATIONS = (
    "DefaultCPUAllocator: can't allocate memory",
    "not enough memory: you tried to allocate",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
"""In messages of torch that have no class of their own."""


@dataclass(frozen=True)
class Packing:
    """What a batch may hold; a prompt that is too large by itself is a batch of its own.

    Args:
        rows: prompts; None: any number.
        tokens: prompts times the tokens of the longest, question and room for its answer included; None: any number.
        answers: rows whose answers are written at once, policies side by side; None: one policy after the other.
    """

    rows: int | None = None
    tokens: int | None = None
    answers: int | None = None

    @classmethod
    def of_keys(cls, batch_size: int | None, batch_tokens: int | None, answers: int | None = None) -> "Packing":
        """Of the keys `batch_size=`, `batch_tokens=` and `answers=`; without the first two, `DEFAULT_TOKENS` tokens."""
        return cls(batch_size, DEFAULT_TOKENS if batch_size is None and batch_tokens is None else batch_tokens, answers)

    def batches(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        """Consecutive prompts, as many as fit together."""
        batch: list[Prompt] = []
        longest = 0
        for prompt in prompts:
            longest = max(longest, prompt.room)
            if batch and not self._fits(len(batch) + 1, longest):
                yield batch
                batch, longest = [], prompt.room
            batch.append(prompt)
        if batch:
            yield batch

    def _fits(self, rows: int, longest: int) -> bool:
        few = self.rows is None or rows <= self.rows
        return few and (self.tokens is None or rows * longest <= self.tokens)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or in the process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    failed = (
        "DefaultCPUAllocator: can't allocate memory",
        "not enough memory: you tried",
        "CUBLAS_STATUS_ALLOC_FAILED",
    )
    return isinstance(error, RuntimeError) and any(text in str(error) for text in failed)


def halves(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The first and the second half of at least two prompts."""
    middle = len(prompts) // 2
    return list(prompts[:middle]), list(prompts[middle:])


def name_of(prompt: Prompt) -> str:
    """What a message calls a prompt."""
    return f"{prompt.task}, {prompt.setting}, prompt {prompt.index} of {len(prompt.prefill_ids):,} tokens"
