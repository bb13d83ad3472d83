"""What a task family is: prompts cut where compression cuts them, and how what comes after is measured."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.data.sample import Sample
from learnkv.evaluation.config import Setting


@dataclass(frozen=True)
class Prompt:
    """One prompt: token ids `read` are read and compressed, token ids `then` are read afterwards.

    `sample` holds the answers of a question, None for text.
    """

    task: str
    length: int
    setting: Setting
    index: int
    read: list[int]
    then: list[int]
    sample: Sample | None = None
    haystack: str | None = None

    @property
    def room(self) -> int:
        """Tokens of the complete prompt with room for an answer."""
        return len(self.read) + len(self.then) + (self.sample.max_new_tokens if self.sample else 0)

    @cached_property
    def digest(self) -> str:
        """Of everything that the model is told and the answer is judged by."""
        judged = (self.sample.answers, self.sample.max_new_tokens, self.sample.metric) if self.sample else None
        return hashlib.sha256(repr((self.read, self.then, judged)).encode()).hexdigest()


class Family(ABC):
    """Prompts of one kind and how they are measured."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    needs_full: bool = False
    """Whether a policy is measured against what the full cache said of the same batch."""

    def effort(self, prompt: Prompt) -> tuple[int, ...]:
        """Prompts of similar effort are measured in one batch."""
        return (len(prompt.read),)

    @abstractmethod
    def measure(
        self, model: nn.Module, prompts: Sequence[Prompt], cache: CompressedCache, full: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        """What a batch makes of what `cache` retains: a record of `score` (0 to 100), `kl` and more per prompt.

        Args:
            prompts: the rows of the batch.
            cache: theirs, appended to.
            full: second result of the same batch with the full cache, None for the full cache itself.
        """


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and their mask, padded with 0 on one side to the longest row."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for at, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[at, where] = torch.tensor(row, dtype=torch.long)
        mask[at, where] = True
    return ids.to(device), mask.to(device)
