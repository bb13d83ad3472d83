"""Batches of contexts and continuations, each a pure function of a seed and its index."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from learnkv.training import seeding as seeding
from learnkv.training.data.sources import Passage, Source


class Batch(NamedTuple):
    """B prompts with C continuations each, continuations of one prompt adjacent."""

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
    """[B*C, T] True where the prediction made there is one of the answer."""
    to_say: int = 0
    """Tokens of the answers that the model has still to give itself; 0: the answers are there."""


@dataclass(frozen=True)
class Drawing:
    """How batches are drawn.

    Args:
        sources: where passages come from, with weights.
        lengths: shortest and longest context in tokens; log-uniform between them.
        batch_size: contexts in a batch.
        query_aware: fraction of the batches whose prompts end with the question.
        seed: another seed, another order and other passages.
        part: name of the stream, "train" or "validation"; streams have nothing in common.
    """

    sources: Sequence[tuple[float, Source]]
    lengths: tuple[int, int]
    batch_size: int
    query_aware: float
    seed: int
    part: str = "train"

    def batch(self, index: int) -> Batch:
        """The batch with this index."""
        rng = seeding.generator(self.seed, self.part, index)
        source = seeding.pick(rng, self.sources)
        length = round(seeding.log_uniform(rng, *self.lengths))
        aware = rng.random() < self.query_aware
        rows = range(index * self.batch_size, (index + 1) * self.batch_size)
        passages = [source(rng, row, length) for row in rows]
        return collate(index, passages, rng if aware else None)


class Batches(Dataset[Batch]):
    """The batches of a drawing with these numbers, in their order."""

    def __init__(self, drawing: Drawing, numbers: range) -> None:
        self.drawing, self.numbers = drawing, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> Batch:
        return self.drawing.batch(self.numbers[index])


def collate(index: int, passages: list[Passage], aware: random.Random | None) -> Batch:
    """Tensors of some passages; with `aware`, one question of each is drawn and put into the prompt.

    The last token of the question stays outside, as the first token of the answer is predicted there.
    """
    prompts, rows = [], []
    for context, continuations, _ in passages:
        prompt = list(context)
        if aware is not None:
            question, answer = aware.choice(continuations)
            prompt += question[:-1]
            continuations = [type(continuations[0])(question[-1:], answer)]
        prompts.append(prompt)
        rows.append(continuations)
    copies = min(len(continuations) for continuations in rows)
    flat = [continuation for continuations in rows for continuation in continuations[:copies]]
    return Batch(index, *pad(prompts, left=True), *following(flat), passages[0].to_say)


def following(pairs: Sequence[tuple[list[int], list[int]]]) -> tuple[Tensor, Tensor, Tensor]:
    """Questions and answers as ids, mask and counted positions, [N, T] each; without its answer none is counted."""
    # The last token of an answer predicts nothing that is known.
    ids, mask = pad([question + answer[:-1] for question, answer in pairs], left=False)
    counted = [[False] * (len(question) - 1) + [True] * len(answer) or [False] for question, answer in pairs]
    there = pad(counted, left=False)[0].bool()
    return ids, mask, torch.nn.functional.pad(there, (0, ids.shape[1] - there.shape[1]))


def pad(rows: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as [N, longest] int64 and their mask; padding is 0."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row, dtype=torch.long)
        mask[i, place] = 1
    return ids, mask
