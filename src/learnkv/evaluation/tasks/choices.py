"""Questions with several choices: the likelihood of each is read, none is generated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError
from learnkv.evaluation.tasks.answers import Answers, sample_of
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.evaluation.tasks.suite import SuiteSample
from learnkv.inference.given_tokens import kl_divergence, read


@dataclass(frozen=True)
class ChoiceSample(SuiteSample):
    """A sample whose answer is one of `choices`, each as it follows the answer prefix; the first answer is right."""

    choices: tuple[str, ...] = ()


class Choices(Answers):
    """The most likely of the choices of each prompt: the sum of the log-probabilities of its tokens.

    A prompt is read and compressed as for `Answers`; then its suffix is read with every choice behind it, each on a
    fork of the cache. KL is that from the full cache, in nats per token of the right choice.
    """

    needs_full = True

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        super().__init__([replace(prompt, metric="choices") for prompt in prompts], tokenizer)

    def choice_ids(self, prompt: Prompt) -> list[list[int]]:
        """Tokens of each choice."""
        sample = sample_of(prompt)
        assert isinstance(sample, ChoiceSample)
        space = "" if sample.answer_prefix[-1:].isspace() or not sample.answer_prefix else " "
        return [self.tokenizer(space + choice, add_special_tokens=False).input_ids for choice in sample.choices]

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """`score` is 100 where the right choice is the most likely, else 0; of equal ones the first is taken."""
        choices = [self.choice_ids(prompt) for prompt in prompts]
        most = max(map(len, choices))
        read_choices = [  # rows with fewer choices repeat their last one
            _choice_logits(model, prompts, [ids[min(number, len(ids) - 1)] for ids in choices], cache.fork())
            for number in range(most)
        ]
        records, right = [], []
        for row, (prompt, ids) in enumerate(zip(prompts, choices, strict=True)):
            logits = [read_choices[number][row] for number in range(len(ids))]
            if any(bool(part.isnan().any()) for part in logits):
                raise RunError(f"the model's output is NaN on {prompt.task}")
            records.append(self._record(prompt, ids, logits, None if full is None else full[row]))
            right.append(logits[_right(prompt)])
        return records, right

    def _record(
        self, prompt: Prompt, ids: Sequence[Sequence[int]], logits: Sequence[Tensor], full: Tensor | None
    ) -> dict[str, Any]:
        """Of each choice's T tokens and its logits [T, V]."""
        sample = sample_of(prompt)
        assert isinstance(sample, ChoiceSample)
        sums = [log_likelihood(part, tokens) for part, tokens in zip(logits, ids, strict=True)]
        best = sums.index(max(sums))
        return {
            "score": 100.0 * (best == _right(prompt)),
            "answer": sample.choices[best],
            "log_likelihoods": sums,
            "kl": 0.0 if full is None else kl_divergence(full, logits[_right(prompt)]),
            "tokens": sum(map(len, ids)),
        }


def log_likelihood(logits: Tensor, tokens: Sequence[int]) -> float:
    """Log-probability of T tokens by their logits [T, V], in nats."""
    wanted = torch.tensor(tokens, device=logits.device).unsqueeze(-1)
    return float(logits.float().log_softmax(-1).gather(-1, wanted).sum())


def _right(prompt: Prompt) -> int:
    """Number of the right choice."""
    sample = sample_of(prompt)
    assert isinstance(sample, ChoiceSample)
    return sample.choices.index(sample.answers[0])


def _choice_logits(
    model: Any, prompts: Sequence[Prompt], choices: Sequence[Sequence[int]], cache: CompressedCache
) -> list[Tensor]:
    """Logits [T, V] of one choice of every row, read after the row's suffix."""
    rows = [[*prompt.suffix_ids, *choice] for prompt, choice in zip(prompts, choices, strict=True)]
    ids, mask = pad([row[:-1] for row in rows], "right", model.device)
    logits = read(model, ids, cache, mask, together=min(len(prompt.suffix_ids) for prompt in prompts))
    begins = [len(prompt.suffix_ids) - 1 for prompt in prompts]
    return [logits[row, begin : len(rows[row]) - 1] for row, begin in enumerate(begins)]
