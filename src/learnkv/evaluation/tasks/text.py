"""Held-out text: how far the continuation's distribution moves when the cache before it is compressed."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.data.text import text_windows
from learnkv.errors import RunError, UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.base import Family, Prompt
from learnkv.inference.generate import continuation

LONGEST_CONTINUATION = 128


class Text(Family):
    """KL (nats per token) from the full cache to the compressed one, perplexity, and next tokens guessed right."""

    needs_full = True

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """`score` is the share of continuation tokens that are the model's first choice.

        Where tokens read chosen pages they come one by one, as in generation: several at once would read everything.
        """
        ids = torch.tensor([prompt.then for prompt in prompts], device=model.device)
        parts = ids.split(ids.shape[1] if cache.read == cache.spent else 1, 1)
        with torch.no_grad():
            logits = torch.cat([continuation(model, part, cache) for part in parts], 1)[:, :-1]
        if bool(logits.isnan().any()):
            raise RunError("the model's output is NaN on text")
        records = [
            self._record(logits[row], ids[row, 1:], None if full is None else full[row]) for row in range(len(ids))
        ]
        return records, logits

    @staticmethod
    def _record(logits: Tensor, labels: Tensor, full: Tensor | None) -> dict[str, Any]:
        said = logits.float().log_softmax(-1)
        right = float((said.argmax(-1) == labels).float().mean())
        loss = -float(said.gather(-1, labels.unsqueeze(-1)).mean())
        kl = 0.0
        if full is not None:
            wanted = full.float().log_softmax(-1)
            kl = float((wanted.exp() * (wanted - said)).sum(-1).mean())
        return {"score": 100 * right, "loss": loss, "kl": kl}


def prompts(config: EvalConfig, length: int, tokenizer: Any) -> list[Prompt]:
    """Windows of `length` tokens, drawn by `config.seed`; the last quarter of each, at most 128 tokens, is continued.

    The last token that is read before is not compressed, so that the first token of the continuation counts too.
    """
    if config.text is None:
        raise UserError("tasks=text: expected text=FILE with held-out text, got none")
    if length < 8:
        raise UserError(f"lengths={length}: expected at least 8 tokens of text")
    windows = text_windows(config.text, tokenizer, length)
    order = list(range(len(windows)))
    random.Random(config.seed).shuffle(order)
    cut = length - min(LONGEST_CONTINUATION, length // 4) - 1
    found = []
    for index in order[: config.samples]:
        ids = windows[index]["input_ids"].tolist()
        found.append(
            Prompt("text", length, "query_agnostic", index, ids[:cut], ids[cut:], haystack=Path(config.text).name)
        )
    return found
