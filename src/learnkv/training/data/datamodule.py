"""`DataModule`: training and validation batches of a run."""

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from learnkv.data.haystack import docstrings
from learnkv.data.retrieval import held_out_kinds
from learnkv.data.text import text_windows
from learnkv.errors import UserError
from learnkv.inference.models import context_length
from learnkv.inference.protected_spans import ProtectedSpans
from learnkv.training.data.batches import Batch, Batches, BatchSampler
from learnkv.training.data.sources import Episodes, NextText, OwnAnswers, Source, Spans
from learnkv.training.data.text_windows import Pool, Stream, Text, Windows
from learnkv.training.settings import DataSettings

HELD_OUT = 0.05
EPISODE_KINDS = {"needle": 3.0, "crowd": 1.5, "codes": 1.5, "values": 1.5, "chain": 1.5, "span": 1.5}
"""Weights of the kinds of `Retrieval` in training; "next" is covered by `mixture.text`."""


class DataModule(L.LightningDataModule):
    """Training and validation batches. Training batches are numbered by optimizer steps, so that a run can be resumed.

    Args:
        settings: data, mixture and batch sizes.
        tokenizer: the model's tokenizer.
        lengths: shortest and longest context in tokens.
        seed: seed of all batches.
    """

    def __init__(self, settings: DataSettings, tokenizer: Any, lengths: tuple[int, int], seed: int) -> None:
        super().__init__()
        self.settings, self.tokenizer = settings, tokenizer
        train, validation = self._texts(lengths[1] + settings.continuation_tokens)
        protect = ProtectedSpans(tokenizer, settings.protect_after) if settings.protect_after else None
        sizes = (lengths, settings.batch_size, settings.query_aware, seed)
        self.samplers = {
            part: BatchSampler(self._sources(text), *sizes, part, protect)
            for part, text in (("train", train), ("validation", validation))
        }

    def _sources(self, text: Text | None) -> list[tuple[float, Source]]:
        """Sources with their weights in the mixture."""
        mixture, count, tokens = self.settings.mixture, self.settings.continuations, self.settings.continuation_tokens
        sources = self._episodes() if mixture.retrieval > 0 else []
        if text is not None:
            sources.append((mixture.reconstruction, Spans(text, count, tokens)))
            sources.append((mixture.text, NextText(text, tokens)))
        if text is not None and mixture.answers > 0:
            sources.append((mixture.answers, OwnAnswers(text, self.tokenizer, count, tokens)))
        return sources

    def _episodes(self) -> list[tuple[float, Source]]:
        """Built-in retrieval episodes of every kind that is not held out."""
        settings = self.settings
        held_out = held_out_kinds(settings.hold_out)
        kinds = {kind: weight for kind, weight in EPISODE_KINDS.items() if kind not in held_out}
        if not kinds:
            raise UserError(f"hold_out={','.join(settings.hold_out)}: leaves nothing of mixture.retrieval to train on")
        total = sum(kinds.values())
        return [
            (
                settings.mixture.retrieval * weight / total,
                Episodes(kind, self.tokenizer, settings.continuations, settings.hold_out),
            )
            for kind, weight in kinds.items()
        ]

    def _texts(self, window: int) -> tuple[Text | None, Text | None]:
        """Training text and validation text."""
        mixture = self.settings.mixture
        if mixture.reconstruction == mixture.text == mixture.answers == 0:
            return None, None
        return self._windows(window) if self.settings.text else self._docstrings(window)

    def _docstrings(self, window: int) -> tuple[Text, Text]:
        joined = "\n\n".join(docstrings())
        ids = torch.tensor(self.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
        held_out = max(window, int(HELD_OUT * len(ids)))
        first = self.tokenizer("a")["input_ids"][:1]
        head = first if first == [self.tokenizer.bos_token_id] else []
        return Pool(ids[:-held_out], head), Pool(ids[-held_out:], head)

    def _windows(self, window: int) -> tuple[Text, Text]:
        settings = self.settings
        rows = text_windows(
            settings.text[0] if len(settings.text) == 1 else settings.text,
            self.tokenizer,
            window,
            name=settings.text_name,
            split=settings.text_split,
            column=settings.text_column,
            streaming=settings.streaming,
        )
        if settings.streaming:
            count = settings.validation_batches * settings.batch_size
            return Stream(rows, first=count), Stream(rows, count=count)
        if len(rows) < 2:
            raise UserError(f"text={','.join(settings.text)}: has {len(rows)} windows of {window} tokens, expected 2")
        end = len(rows) - max(1, int(HELD_OUT * len(rows)))
        return Windows(rows.select(range(end))), Windows(rows.select(range(end, len(rows))))

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        per_step = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return self._loader("train", self.trainer.global_step * per_step, self.trainer.max_steps * per_step)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation", 0, self.settings.validation_batches)

    def _loader(self, part: str, first: int, count: int) -> DataLoader[Batch]:
        """At least `count` batches from number `first` on, assigned to the processes round-robin."""
        assert self.trainer is not None
        processes, workers = self.trainer.world_size, self.settings.workers
        end = first + -(-count // processes) * processes
        batches = Batches(self.samplers[part], range(first + self.trainer.global_rank, end, processes))
        return DataLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def context_lengths(model: Any, settings: DataSettings) -> tuple[int, int]:
    """Shortest and longest prompt in tokens.

    By default 512 to 1,024, or the upper half of what fits into the model's context beside the continuation.

    Raises:
        UserError: the longest prompt does not fit.
    """
    limit = context_length(model)
    new = settings.continuation_tokens
    longest = 1024 if limit is None else min(1024, max(2, limit - new))
    lengths = settings.lengths or (longest // 2, longest)
    if limit is not None and lengths[1] + new > limit:
        raise UserError(
            f"lengths={lengths[0]},{lengths[1]}: with continuations of {new} tokens this is more than the model's "
            f"context of {limit}"
        )
    return lengths
