"""Questions with known answers: generated greedily, judged by which answers occur in what was said."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from learnkv.cache import CompressedCache
from learnkv.data.sample import Sample
from learnkv.evaluation.config import Setting
from learnkv.evaluation.tasks.base import Family, Prompt, pad
from learnkv.generation import generate
from learnkv.models import format_prompt

LOOK_EVERY = 4


class Answers(Family):
    """RULER-like tasks.

    Query-agnostic: the context is compressed, then question and answer prefix are read. Query-aware: context and
    question are compressed, then the answer prefix is read, or the question's last token where there is no prefix.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        # Rows that say about as much are generated together.
        super().__init__(sorted(prompts, key=lambda p: (sum(map(len, _sample(p).answers)), p.task, len(p.read))))
        self.tokenizer = tokenizer

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """Score of what is said, up to the end of the answer: EOS, all answers found, or the task's token limit."""
        ids, mask = pad([prompt.then for prompt in prompts], "right", model.device)
        samples = [_sample(prompt) for prompt in prompts]
        end = EndOfAnswer(self.tokenizer, samples, eos_tokens(model))
        said = generate(model, ids, cache, mask, max_new_tokens=max(s.max_new_tokens for s in samples), stop=end)
        texts = end.texts(said)
        return [{"score": 100 * s.score(text), "answer": text} for s, text in zip(samples, texts, strict=True)], None


def tokenised(samples: Iterable[tuple[int, Sample]], setting: Setting, length: int, tokenizer: Any, **more: Any) -> Any:
    """Prompts of numbered samples in one setting, tokenised part by part so that both settings read the same tokens."""
    for index, sample in samples:
        parts = format_prompt(tokenizer, sample.context, sample.question, sample.answer_prefix)
        context, question, prefix = (
            tokenizer(part, add_special_tokens=False).input_ids if part else [] for part in parts
        )
        cut = len(context) if setting == "query_agnostic" else len(context) + len(question)
        whole = context + question + prefix
        cut = min(cut, len(whole) - 1)
        yield Prompt(sample.task, length, setting, index, whole[:cut], whole[cut:], sample, **more)


class EndOfAnswer:
    """Says which rows of generated tokens [B, new] are complete, and what they say until there.

    A row ends where nothing it may still say can change its score (all answers found), at an EOS token or at its
    sample's token limit. Text is looked at every `LOOK_EVERY` tokens, since decoding costs more than a token.
    """

    def __init__(self, tokenizer: Any, samples: Sequence[Sample], eos: set[int]) -> None:
        self.tokenizer, self.samples, self.eos = tokenizer, samples, eos
        self.ends: list[int | None] = [None] * len(samples)

    def __call__(self, said: Tensor) -> Tensor:
        new, rows = said.shape[1], said.tolist()
        for row, sample in enumerate(self.samples):
            if self.ends[row] is not None:
                continue
            limit = new >= sample.max_new_tokens or rows[row][-1] in self.eos
            if limit or (new % LOOK_EVERY == 0 and sample.score(self._text(rows[row])) == 1):
                self.ends[row] = new
        return torch.tensor([end is not None for end in self.ends], device=said.device)

    def texts(self, said: Tensor) -> list[str]:
        """What each row says up to its end."""
        return [self._text(row[:end]) for row, end in zip(said.tolist(), self.ends, strict=True)]

    def _text(self, row: list[int]) -> str:
        return str(self.tokenizer.decode(row, skip_special_tokens=True))


def eos_tokens(model: Any) -> set[int]:
    """The tokens at which `generate` ends a row."""
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(chain(eos))


def _sample(prompt: Prompt) -> Sample:
    assert prompt.sample is not None
    return prompt.sample
