"""Held-out text: KL divergence of the continuation with a compressed cache from that with the full cache."""

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
from learnkv.inference.given_tokens import kl_divergence, read

LONGEST_CONTINUATION = 128


class Text(Family):
    """KL (nats per token) from the full cache to the compressed one, perplexity, and next-token accuracy."""

    needs_full = True

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """`score` is the percentage of continuation tokens that the model ranks first."""
        ids = torch.tensor([prompt.suffix_ids for prompt in prompts], device=model.device)
        logits = read(model, ids, cache)[:, :-1]
        if bool(logits.isnan().any()):
            raise RunError("the model's output is NaN on text")
        records = [
            self._record(logits[row], ids[row, 1:], None if full is None else full[row]) for row in range(len(ids))
        ]
        return records, logits

    @staticmethod
    def _record(logits: Tensor, labels: Tensor, full: Tensor | None) -> dict[str, Any]:
        log_probs = logits.float().log_softmax(-1)
        accuracy = float((log_probs.argmax(-1) == labels).float().mean())
        loss = -float(log_probs.gather(-1, labels.unsqueeze(-1)).mean())
        kl = 0.0 if full is None else kl_divergence(full, logits)
        return {"score": 100 * accuracy, "loss": loss, "kl": kl, "tokens": len(labels) + 1}


def prompts(config: EvalConfig, length: int, tokenizer: Any) -> list[Prompt]:
    """Windows of `length` tokens, drawn by `config.seed`; the last quarter, at most 128 tokens, is the continuation.

    The token before it is not compressed, so that the first token of the continuation is scored too.
    """
    if config.text is None:
        raise UserError("tasks=text: expected text=FILE with held-out text, got none")
    if length < 8:
        raise UserError(f"lengths={length}: expected at least 8 tokens of text")
    windows = text_windows(config.text, tokenizer, length)
    order = list(range(len(windows)))
    random.Random(config.seed).shuffle(order)
    cut = length - min(LONGEST_CONTINUATION, length // 4) - 1
    source = Path(config.text).name
    ids = {index: windows[index]["input_ids"].tolist() for index in order[: config.samples]}
    return [
        Prompt("text", length, "query_agnostic", index, tokens[:cut], tokens[cut:], None, source, "forced", text=shown)
        for (index, tokens), shown in zip(ids.items(), tokenizer.batch_decode(list(ids.values())), strict=True)
    ]
