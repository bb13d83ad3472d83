"""Batches of contexts and continuations, each a pure function of a seed and its index."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from learnkv.core.protection import Protection
from learnkv.inference.protected_spans import ProtectedSpans
from learnkv.training import seeding
from learnkv.training.data.sources import Passage, Source


class Batch(NamedTuple):
    """B prompts with C continuations each; continuations of one prompt are adjacent."""

    number: int
    prompts: Tensor
    """[B, S] left-padded."""
    prompt_mask: Tensor
    """[B, S] 1 for tokens."""
    continuations: Tensor
    """[B*C, T] right-padded."""
    continuation_mask: Tensor
    """[B*C, T] 1 for tokens."""
    counted: Tensor
    """[B*C, T] True where the next token belongs to the answer: these predictions are in the loss."""
    tokens_to_generate: int = 0
    """Length of the answers that the model has yet to generate; 0: the continuations are complete."""
    protection: Protection | None = None
    """Spans of the prompts that every policy keeps."""


@dataclass(frozen=True)
class BatchSampler:
    """Makes batches from weighted sources.

    Args:
        sources: sources of passages, with weights.
        lengths: shortest and longest context in tokens; log-uniform between them.
        batch_size: contexts per batch.
        query_aware: fraction of the batches whose prompts end with the question.
        seed: seed of order and passages.
        part: "train" or "validation", which have independent random numbers.
        protect: finds the protected spans of prompts.
    """

    sources: Sequence[tuple[float, Source]]
    lengths: tuple[int, int]
    batch_size: int
    query_aware: float
    seed: int
    part: str = "train"
    protect: ProtectedSpans | None = None

    def batch(self, index: int) -> Batch:
        """Batch number `index`."""
        rng = seeding.generator(self.seed, self.part, index)
        source = seeding.weighted_choice(rng, self.sources)
        length = round(seeding.log_uniform(rng, *self.lengths))
        aware = rng.random() < self.query_aware
        rows = range(index * self.batch_size, (index + 1) * self.batch_size)
        passages = [source(rng, row, length) for row in rows]
        return collate(index, passages, rng if aware else None, self.protect)


class Batches(Dataset[Batch]):
    """A data set of a sampler's batches with these numbers, in order."""

    def __init__(self, sampler: BatchSampler, numbers: range) -> None:
        self.sampler, self.numbers = sampler, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Batch:
        return self.sampler.batch(self.numbers[index])


def collate(
    index: int, passages: list[Passage], query_aware: random.Random | None, protect: ProtectedSpans | None = None
) -> Batch:
    """Tensors of passages; with `query_aware`, a random question of each is moved into the prompt.

    The last token of the question stays outside, as the first token of the answer is predicted there.
    """
    prompts, rows = [], []
    for context, continuations, _ in passages:
        prompt = list(context)
        if query_aware is not None:
            question, answer = query_aware.choice(continuations)
            prompt += question[:-1]
            continuations = [type(continuations[0])(question[-1:], answer)]
        prompts.append(prompt)
        rows.append(continuations)
    copies = min(len(continuations) for continuations in rows)
    pairs = [continuation for continuations in rows for continuation in continuations[:copies]]
    protection = None if protect is None else protect(prompts)
    parts = (*pad(prompts, left=True), *pad_continuations(pairs))
    return Batch(index, *parts, passages[0].tokens_to_generate, protection)


def pad_continuations(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, mask and counted positions [N, T] of (question, answer) pairs; nothing is counted without answers."""
    # The last token of an answer has no next token to predict.
    ids, mask = pad([question + answer[:-1] for question, answer in pairs], left=False)
    counted = [[False] * (len(question) - 1) + [True] * len(answer) or [False] for question, answer in pairs]
    is_counted = pad(counted, left=False)[0].bool()
    return ids, mask, torch.nn.functional.pad(is_counted, (0, ids.shape[1] - is_counted.shape[1]))


def pad(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as [N, longest] int64, padded with 0, and their mask."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, columns] = torch.tensor(row, dtype=torch.long)
        mask[i, columns] = 1
    return ids, mask
