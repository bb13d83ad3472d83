"""Questions whose correct answer is read, not generated: one pass per policy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.errors import RunError
from learnkv.evaluation.tasks.answers import Answers, sample_of
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.inference.given_tokens import kl_divergence, read


class Forced(Answers):
    """Teacher-forced answers: whether the model ranks every token of the correct answer first, and the KL there.

    A prompt is read and compressed as for `Answers`; then its suffix is read with the answer behind it. KL is that from
    the full cache, in nats per token of the answer. The answer ends without a mark: what follows it is not counted.
    """

    needs_full = True

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        super().__init__([replace(prompt, metric="forced") for prompt in prompts], tokenizer)

    def answer_ids(self, prompt: Prompt) -> list[int]:
        """Tokens of the correct answer, as many as may be generated."""
        sample = sample_of(prompt)
        space = "" if sample.answer_prefix[-1:].isspace() or not sample.answer_prefix else " "
        ids: list[int] = self.tokenizer(space + sample.gold, add_special_tokens=False).input_ids
        return ids[: sample.max_new_tokens]

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """`score` is 100 where every token of the answer is ranked first, else 0."""
        answers = [self.answer_ids(prompt) for prompt in prompts]
        rows = [prompt.suffix_ids + answer for prompt, answer in zip(prompts, answers, strict=True)]
        ids, mask = pad([row[:-1] for row in rows], "right", model.device)
        question = min(len(prompt.suffix_ids) for prompt in prompts)
        logits = read(model, ids, cache, mask, together=question)
        predictions = [
            logits[row, len(prompt.suffix_ids) - 1 : len(tokens) - 1]
            for row, (prompt, tokens) in enumerate(zip(prompts, rows, strict=True))
        ]
        if any(bool(prediction.isnan().any()) for prediction in predictions):
            raise RunError(f"the model's output is NaN on {prompts[0].task}")
        return [
            self._record(prediction, answer, None if full is None else full[row])
            for row, (prediction, answer) in enumerate(zip(predictions, answers, strict=True))
        ], predictions

    def _record(self, logits: Tensor, answer: Sequence[int], full: Tensor | None) -> dict[str, Any]:
        """Of logits [T, V] and the answer's T tokens."""
        first = logits.argmax(-1)
        correct = torch.equal(first.cpu(), torch.tensor(answer))
        kl = 0.0 if full is None else kl_divergence(full, logits)
        return {"score": 100.0 * correct, "answer": self.tokenizer.decode(first), "kl": kl, "tokens": len(answer)}
