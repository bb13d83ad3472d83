"""Fidelity: what compression changes in a model's output on text, measured against the full cache."""

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.data.haystack import essay
from learnkv.data.text import text_windows
from learnkv.errors import RunError, UserError
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.fidelity import TASK
from learnkv.evaluation.tasks.answers import GREEDY, eos_tokens
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.ruler import essay_name
from learnkv.evaluation.tasks.text import Text, windows_as_prompts
from learnkv.inference.generate import generate

NEW_TOKENS = 48
"""Most tokens that are generated after a text."""
CUE, QUOTE = 8, 16
"""Tokens of a passage of the text that are given, and that are to follow."""
SHORTEST = 4 * (CUE + QUOTE)
"""Tokens of a window."""


class Output(NamedTuple):
    """What policies are compared with: the full cache's logits [T, V] and generated tokens of every row."""

    logits: Tensor
    generated: Sequence[Sequence[int]]


class Fidelity(Text):
    """KL and top-1 flips on the text that follows, a greedy continuation, and a passage that is to be quoted.

    `kl` is in nats per token, `flips` the percentage of tokens whose most likely next token is another one than with
    the full cache, and `score` the percentage of tokens that the model ranks first, as for text. A continuation of up
    to `NEW_TOKENS` tokens, no more than follow in the text, is generated: `agreement` is the percentage of its places
    with the full cache's token, `length_drift` its length relative to the full cache's in percent. For `quote`, `CUE`
    tokens of a passage of the compressed text are read and the `QUOTE` that follow it there are to be generated: the
    percentage before the first wrong one.
    """

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """Records as of `Text`, with `flips`, `agreement`, `length_drift` and `quote`."""
        limit = min(NEW_TOKENS, *(len(prompt.suffix_ids) for prompt in prompts))
        continued = _generated(model, [prompt.suffix_ids[:1] for prompt in prompts], cache.fork(), limit)
        passages = [_passage(prompt) for prompt in prompts]
        cues = [self._break() + passage[:CUE] for passage in passages]
        quoted = _generated(model, cues, cache.fork(), QUOTE)
        records, logits = super().measure(model, prompts, cache, None if full is None else full.logits)
        own = Output(logits, continued)
        other = own if full is None else full
        for row, record in enumerate(records):
            tokens, expected = continued[row], other.generated[row]
            record["flips"] = 100 * _share_of_flips(logits[row], other.logits[row])
            record["agreement"] = 100 * _agreement(tokens, expected)
            record["length_drift"] = 100 * (len(tokens) - len(expected)) / len(expected)
            record["quote"] = 100 * _common(quoted[row], passages[row][CUE:]) / QUOTE
            record["answer"] = self.tokenizer.decode(tokens)
        return records, own

    def _break(self) -> list[int]:
        """The end of a paragraph."""
        ids: list[int] = self.tokenizer("\n\n", add_special_tokens=False).input_ids
        return ids


def prompts(config: EvalConfig, length: int, tokenizer: Any) -> list[Prompt]:
    """Windows of `length` tokens of `text=`, or of CPython's help topics, drawn by `config.seed`."""
    if length < SHORTEST:
        raise UserError(f"lengths={length}: expected at least {SHORTEST} tokens for {TASK}")
    if config.text is not None:
        windows = [window["input_ids"].tolist() for window in text_windows(config.text, tokenizer, length)]
        source = Path(config.text).name
    else:
        ids = tokenizer(" ".join(essay()), add_special_tokens=False, verbose=False).input_ids
        windows = [ids[begin : begin + length] for begin in range(0, len(ids) - length + 1, length)]
        source = essay_name(None)
    return windows_as_prompts(windows, config, length, tokenizer, TASK, source)


def _generated(model: Any, rows: Sequence[Sequence[int]], cache: CompressedCache, limit: int) -> list[list[int]]:
    """Greedy tokens of every row after its own ones, all of the same number, up to its end."""
    ids, eos = torch.tensor(rows, device=model.device), eos_tokens(model)
    settings = {**GREEDY, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    new = generate(model, ids, cache, max_new_tokens=limit, **settings).tolist()
    ends = [next((place + 1 for place, token in enumerate(row) if token in eos), len(row)) for row in new]
    return [row[:end] for row, end in zip(new, ends, strict=True)]


def _passage(prompt: Prompt) -> list[int]:
    """`CUE + QUOTE` tokens of the compressed text whose first `CUE` occur once in it."""
    ids, rng = prompt.prefill_ids, random.Random(prompt.index)
    cues = [tuple(ids[begin : begin + CUE]) for begin in range(len(ids) - CUE + 1)]
    counts = Counter(cues)
    unique = [begin for begin, cue in enumerate(cues[:-QUOTE]) if counts[cue] == 1]
    if not unique:
        raise RunError(f"{TASK}, prompt {prompt.index}: every passage of {CUE} tokens occurs twice, no quote is unique")
    begin = rng.choice(unique)
    return ids[begin : begin + CUE + QUOTE]


def _share_of_flips(logits: Tensor, full: Tensor) -> float:
    """Share of logits [T, V] whose largest is another one in `full`."""
    return float((logits.argmax(-1) != full.argmax(-1)).float().mean())


def _agreement(tokens: Sequence[int], expected: Sequence[int]) -> float:
    """Share of the places of the longer one with the same token in both."""
    return sum(a == b for a, b in zip(tokens, expected, strict=False)) / max(len(tokens), len(expected))


def _common(tokens: Sequence[int], expected: Sequence[int]) -> int:
    """Tokens before the first difference."""
    pairs = enumerate(zip(tokens, expected, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(tokens), len(expected)))
