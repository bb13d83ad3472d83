"""Base of task families: prompts cut where the cache is compressed, and a measurement of the tokens that follow."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.data.sample import Sample
from learnkv.evaluation.config import Measured, Setting
from learnkv.evaluation.sources import source_digest
from learnkv.inference.digest import tokenizer_digest

BEGINNING, END = 100, 300
"""Characters of a long prompt that records show."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: `prefill_ids` are read and compressed, `suffix_ids` are read afterwards.

    `sample` has the answers of a question; None for text. `metric`: the output is generated, or given tokens or choices
    are read. `measurement` is the digest of the task family that measures it, `text` the whole prompt for readers.
    `cut_tokens` of its middle were left out. `version` is the family's; `n_original` rows were there to draw the task's
    prompts from, None where they are made.
    """

    task: str
    length: int
    setting: Setting
    index: int
    prefill_ids: list[int]
    suffix_ids: list[int]
    sample: Sample | None = None
    haystack: str | None = None
    metric: Measured = "generated"
    measurement: str = ""
    text: str = ""
    cut_tokens: int = 0
    version: int = 1
    n_original: int | None = None

    @property
    def room(self) -> int:
        """Tokens of the complete prompt with room for an answer."""
        return len(self.prefill_ids) + len(self.suffix_ids) + (self.sample.max_new_tokens if self.sample else 0)

    @cached_property
    def digest(self) -> str:
        """Hash of the tokens and of the answers, metric and task family that score the output."""
        scoring = self.sample.scoring if self.sample else None
        about = (self.prefill_ids, self.suffix_ids, scoring, self.measurement)
        return hashlib.sha256(repr(about).encode()).hexdigest()

    @property
    def shown(self) -> str:
        """The text of the prompt, long ones without their middle."""
        left_out = len(self.text) - BEGINNING - END
        if left_out <= 0:
            return self.text
        return f"{self.text[:BEGINNING]} [… {left_out} characters …] {self.text[-END:]}"


class Family(ABC):
    """Prompts of one kind and their measurement.

    Args:
        prompts: each gets the family's digest, so that samples of another measurement are not taken for this one's.
        tokenizer: the tokenizer of the prompts; None: its identity does not count.
    """

    version: int = 1
    """Of the measurement and its metric: a larger one makes stored samples unknown."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        rules = "" if tokenizer is None else tokenizer_digest(tokenizer)
        kinds = {type(prompt.sample or prompt): None for prompt in prompts}
        measured = {kind: f"{self.version} {self._sources(kind)} {rules}" for kind in kinds}
        self.prompts = [replace(p, measurement=measured[type(p.sample or p)], version=self.version) for p in prompts]

    def _sources(self, kind: type) -> str:
        """Digest of the code that measures prompts whose sample is of this class, and of packages that it scores by."""
        own = [kind] if issubclass(kind, Sample) and kind is not Sample else []
        packages = [f"{name} {version(name)}" for name in getattr(kind, "packages", ())]
        return " ".join([source_digest(type(self), Sample, *own), *packages])

    needs_full: bool = False
    """Whether a policy is measured against the output of the full cache on the same batch."""

    def effort(self, prompt: Prompt) -> tuple[int, ...]:
        """Prompts of similar effort are measured in one batch."""
        return (len(prompt.prefill_ids),)

    @abstractmethod
    def measure(
        self, model: nn.Module, prompts: Sequence[Prompt], cache: CompressedCache, full: Any
    ) -> tuple[list[dict[str, Any]], Any]:
        """Read the suffixes with the compressed prompts and score the output.

        Args:
            prompts: the rows of the batch.
            cache: the compressed prompts; tokens are appended.
            full: second result of the same batch with the full cache, None for the full cache itself.

        Returns:
            A record with `score` (0 to 100), `tokens` (generated or read), `kl` and more per prompt, and what other
            policies are measured against.
        """


def pad(rows: Sequence[Sequence[int]], side: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids [B, T] and their mask, padded with 0 on one side to the longest row."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        columns = slice(longest - len(tokens), longest) if side == "left" else slice(0, len(tokens))
        ids[row, columns] = torch.tensor(tokens, dtype=torch.long)
        mask[row, columns] = True
    return ids.to(device), mask.to(device)
