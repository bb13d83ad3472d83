"""What the reference model can do with its full cache: RULER scores and text perplexity."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from learnkv.data.ruler import Ruler
from learnkv.data.sample import Sample


@dataclass(frozen=True)
class Figure:
    """Mean score of a task at a length, 0 to 100, with its standard error over `n` prompts."""

    task: str
    length: int
    n: int
    score: float
    stderr: float


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of `tokens` predicted tokens under the model and under their own unigram frequencies."""

    model: float
    unigram: float
    tokens: int


def ruler_figure(model: Any, tokenizer: Any, ruler: Ruler, task: str, samples: int, batch: int) -> Figure:
    """Greedy score of the first `samples` prompts of a task. Raises ValueError where the task does not fit."""
    drawn = [ruler.sample(task, index) for index in range(samples)]
    scores: list[float] = []
    for at in range(0, samples, batch):
        group = drawn[at : at + batch]
        for sample, said in zip(group, answers(model, tokenizer, group), strict=True):
            scores.append(100 * sample.score(said))
    spread = stdev(scores) / math.sqrt(samples) if samples > 1 else math.nan
    return Figure(task, ruler.length, samples, fmean(scores), spread)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, samples: list[Sample]) -> list[str]:
    """Greedy answers to prompts of one task, read in one left-padded batch."""
    prompts = [
        tokenizer(sample.context)["input_ids"]
        + tokenizer(sample.question + sample.answer_prefix, add_special_tokens=False)["input_ids"]
        for sample in samples
    ]
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max(sample.max_new_tokens for sample in samples),
        do_sample=False,
    )
    answers: list[str] = tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
    return answers


@torch.no_grad()
def perplexity(model: Any, windows: Iterator[torch.Tensor]) -> Perplexity:
    """Perplexity over windows [T] of token ids, each predicted from its own beginning."""
    total, counts = 0.0, Counter[int]()
    for window in windows:
        ids = window[None].to(model.device)
        logits = model(input_ids=ids).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        counts.update(window[1:].tolist())
    tokens = counts.total()
    unigram = -sum(count * math.log(count / tokens) for count in counts.values()) / tokens
    return Perplexity(math.exp(total / tokens), math.exp(unigram), tokens)
