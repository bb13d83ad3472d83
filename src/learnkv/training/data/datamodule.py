"""The batches of a run, from the keys of `train.py`."""

from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from learnkv.data.haystack import docstrings
from learnkv.data.retrieval import held_out_kinds
from learnkv.data.text import text_windows
from learnkv.errors import UserError
from learnkv.training.config import TrainConfig
from learnkv.training.data.batches import Batch, Batches, Drawing
from learnkv.training.data.sources import Episodes, NextText, OwnAnswers, Source, Spans
from learnkv.training.data.text_windows import Pool, Stream, Text, Windows

HELD_OUT = 0.05
EPISODE_KINDS = {"needle": 3.0, "crowd": 1.5, "codes": 1.5, "values": 1.5, "chain": 1.5, "span": 1.5}
"""Kinds of `Retrieval` that are trained on, with weights; "next" is what `text` is for."""


class Data(L.LightningDataModule):
    """Training and validation batches; the training's are counted by optimizer steps, so that a resumed run goes on.

    Args:
        config: of the run.
        tokenizer: of the model.
        context: longest prompt of the model with its continuation, None if it has no limit.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, context: int | None) -> None:
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.lengths = lengths_within(context, config)
        smallest = min(config.keep or config.keep_range)
        if smallest * self.lengths[0] < 1:
            raise UserError(
                f"keep={smallest:g}: leaves less than one entry per head of a context of {self.lengths[0]} tokens"
            )
        train, validation = self._texts(self.lengths[1] + config.continuation_tokens)
        self.drawings = {
            "train": self._drawing("train", self._sources(train)),
            "validation": self._drawing("validation", self._sources(validation)),
        }

    def _drawing(self, part: str, sources: list[tuple[float, Source]]) -> Drawing:
        config = self.config
        return Drawing(sources, self.lengths, config.batch_size, config.query_aware, config.seed, part)

    def _sources(self, text: Text | None) -> list[tuple[float, Source]]:
        config, found = self.config, list[tuple[float, Source]]()
        if config.mixture.retrieval > 0:
            held_out = held_out_kinds(config.hold_out)
            kinds = {kind: weight for kind, weight in EPISODE_KINDS.items() if kind not in held_out}
            if not kinds:
                raise UserError(
                    f"hold_out={','.join(config.hold_out)}: leaves nothing of mixture.retrieval to train on"
                )
            whole = sum(kinds.values())
            for kind, weight in kinds.items():
                episodes = Episodes(kind, self.tokenizer, config.continuations, config.hold_out)
                found.append((config.mixture.retrieval * weight / whole, episodes))
        if text is not None:
            spans = Spans(text, config.continuations, config.continuation_tokens)
            found.append((config.mixture.reconstruction, spans))
            found.append((config.mixture.text, NextText(text, config.continuation_tokens)))
        if text is not None and config.mixture.answers > 0:
            own = OwnAnswers(text, self.tokenizer, config.continuations, config.continuation_tokens)
            found.append((config.mixture.answers, own))
        return found

    def _texts(self, window: int) -> tuple[Text | None, Text | None]:
        """Text to train on and text to validate on."""
        config = self.config
        if config.mixture.reconstruction == config.mixture.text == config.mixture.answers == 0:
            return None, None
        if not config.text:
            joined = "\n\n".join(docstrings())
            ids = torch.tensor(self.tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
            held_out = max(window, int(HELD_OUT * len(ids)))
            first = self.tokenizer("a")["input_ids"][:1]
            head = first if first == [self.tokenizer.bos_token_id] else []
            return Pool(ids[:-held_out], head), Pool(ids[-held_out:], head)
        rows = text_windows(
            config.text[0] if len(config.text) == 1 else config.text,
            self.tokenizer,
            window,
            name=config.text_name,
            split=config.text_split,
            column=config.text_column,
            streaming=config.streaming,
        )
        if config.streaming:
            count = config.validation_batches * config.batch_size
            return Stream(rows, first=count), Stream(rows, count=count)
        if len(rows) < 2:
            raise UserError(f"text={','.join(config.text)}: holds {len(rows)} windows of {window} tokens, expected 2")
        held_out = max(1, int(HELD_OUT * len(rows)))
        return (
            Windows(rows.select(range(len(rows) - held_out))),
            Windows(rows.select(range(len(rows) - held_out, len(rows)))),
        )

    def train_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        per_step = self.trainer.world_size * self.trainer.accumulate_grad_batches
        return self._loader("train", self.trainer.global_step * per_step, self.trainer.max_steps * per_step)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("validation", 0, self.config.validation_batches)

    def _loader(self, part: str, first: int, count: int) -> DataLoader[Batch]:
        """At least `count` batches from number `first` on, dealt out to the processes in turn."""
        assert self.trainer is not None
        processes, workers = self.trainer.world_size, self.config.workers
        end = first + -(-count // processes) * processes
        batches = Batches(self.drawings[part], range(first + self.trainer.global_rank, end, processes))
        return DataLoader(batches, batch_size=None, num_workers=workers, persistent_workers=workers > 0)


def lengths_within(context: int | None, config: TrainConfig) -> tuple[int, int]:
    """The shortest and the longest prompt of a training; if not given, 512 to 1,024 tokens, or the upper half of what
    fits into the model's `context` with the continuation.

    Raises:
        UserError: where the longest does not fit.
    """
    new = config.continuation_tokens
    longest = 1024 if context is None else min(1024, max(2, context - new))
    lengths = config.lengths or (longest // 2, longest)
    if context is not None and lengths[1] + new > context:
        raise UserError(
            f"lengths={lengths[0]},{lengths[1]}: with continuations of {new} tokens this is more than the model's "
            f"context of {context}"
        )
    return lengths
