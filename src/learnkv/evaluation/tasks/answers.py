"""Questions with known answers: greedy generation, scored by the answers that occur in the generated text."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.data.sample import Sample
from learnkv.errors import UserError
from learnkv.evaluation.config import Setting
from learnkv.evaluation.tasks.base import Family, Prompt, pad
from learnkv.evaluation.tasks.held_bytes import HeldBytes
from learnkv.inference.generate import generate
from learnkv.inference.prompt_format import format_prompt

ROUND = 8
GREEDY: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "forced_eos_token_id": None,
    "stop_strings": None,
    "max_time": None,
}
"""Greedy in rounds: penalties are those of the model's generation config, the end of an answer is `EndOfAnswer`'s."""
LOOP = 32
LONGEST_PERIOD = 24


class Answers(Family):
    """RULER-like tasks.

    Query-agnostic: the context is compressed, then question and answer prefix are read. Query-aware: context and
    question are compressed, then the answer prefix is read, or the question's last token where there is no prefix.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        super().__init__(prompts, tokenizer)

    def effort(self, prompt: Prompt) -> tuple[int, ...]:
        """Length of the prompt to an eighth of it, so that few slots of a batch are padding; then of the answers."""
        tokens = len(prompt.prefill_ids)
        bits = tokens.bit_length()
        return bits, 16 * tokens >> bits, sum(map(len, sample_of(prompt).answers)), tokens

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """Generate until every answer has ended, never beyond the longest limit; finished rows leave the batch."""
        ends = EndOfAnswer(self.tokenizer, eos_tokens(model))
        generated: list[list[int]] = [[] for _ in prompts]
        ids, padded = pad([prompt.suffix_ids for prompt in prompts], "right", model.device)
        mask: Tensor | None = padded
        rows, earlier = list(range(len(prompts))), 0  # prompts that are still in the batch, and their new tokens
        memory = HeldBytes(cache)
        while True:
            longest = max(sample_of(prompts[row]).max_new_tokens for row in rows)
            count = min(ROUND, longest - earlier)
            new = generate(model, ids, cache, mask, max_new_tokens=count, earlier=earlier, **GREEDY).tolist()
            earlier += count
            memory.update(cache, rows)
            for row, tokens in zip(rows, new, strict=True):
                generated[row] = ends.cut(generated[row] + tokens, sample_of(prompts[row]))
            unfinished = [index for index, row in enumerate(rows) if not ends(generated[row], sample_of(prompts[row]))]
            if not unfinished:
                break
            if len(unfinished) < len(rows):
                rows = [rows[index] for index in unfinished]
                cache.batch_select_indices(torch.tensor(unfinished, device=model.device))
            # The next round reads the last token; as the unread end of a turn it would be read twice.
            cache.pending = None
            ids, mask = torch.tensor([generated[row][-1:] for row in rows], device=model.device), None
        texts = [ends.text(tokens) for tokens in generated]
        return [
            {"score": 100 * sample_of(prompt).score(text), "answer": text, "tokens": len(tokens), "held_bytes": most}
            for prompt, text, tokens, most in zip(prompts, texts, generated, memory.most, strict=True)
        ], None


class EndOfAnswer:
    """Whether generated tokens are a complete answer.

    An answer ends at an EOS token, at its sample's token limit, where no further token can change the score, such as
    where it contains all expected answers, and where greedy decoding repeats itself: the same tokens three times and
    `LOOP` tokens in all, unless the metric counts repetitions. The end of a sentence or a line does not count, as it
    may lie in the middle of an answer.
    """

    def __init__(self, tokenizer: Any, eos: set[int]) -> None:
        self.tokenizer, self.eos = tokenizer, eos

    def __call__(self, tokens: list[int], sample: Sample) -> bool:
        limit = len(tokens) >= sample.max_new_tokens or tokens[-1] in self.eos
        return limit or (sample.loops_decide and loops(tokens)) or sample.complete(self.text(tokens))

    def cut(self, tokens: list[int], sample: Sample) -> list[int]:
        """Tokens up to the first EOS token and the sample's limit."""
        end = next((index + 1 for index, token in enumerate(tokens) if token in self.eos), len(tokens))
        return tokens[: min(end, sample.max_new_tokens)]

    def text(self, tokens: list[int]) -> str:
        """Decoded tokens without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last `LOOP` tokens or more are the same few tokens, at least three times in a row."""
    for period in range(1, LONGEST_PERIOD + 1):
        span = max(LOOP, 3 * period)
        if len(tokens) >= span and tokens[len(tokens) - span + period :] == tokens[len(tokens) - span : -period]:
            return True
    return False


def eos_tokens(model: Any) -> set[int]:
    """End-of-sequence tokens of a model."""
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def tokenised(
    samples: Iterable[tuple[int, Sample]],
    setting: Setting,
    length: int,
    tokenizer: Any,
    haystack: str | None = None,
    cut_to: int | None = None,
) -> Iterator[Prompt]:
    """Prompts of numbered samples in one setting, tokenised part by part: both settings have the same tokens.

    Args:
        cut_to: tokens of a prompt with room for its answer above which its middle is left out; None: none is cut.
    """
    for index, sample in samples:
        texts = format_prompt(
            tokenizer, sample.context, sample.question, sample.answer_prefix, sample.system, sample.chat
        )
        parts = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
        excess = 0
        if cut_to is not None:
            if sample.max_new_tokens > cut_to // 2:
                least = 2 * sample.max_new_tokens
                raise UserError(f"lengths={length}: {sample.task} has answers of {least // 2} tokens, expected {least}")
            parts, excess = without_middle(parts, cut_to - sample.max_new_tokens)
        context, question, prefix = parts
        whole = context + question + prefix
        cut = len(context) if setting == "query_agnostic" else len(context) + len(question)
        cut = max(1, min(cut, len(whole) - 1))
        text = "".join(texts)
        yield Prompt(
            sample.task,
            length,
            setting,
            index,
            whole[:cut],
            whole[cut:],
            sample,
            haystack,
            text=text,
            cut_tokens=excess,
        )


def without_middle(parts: Sequence[list[int]], room: int) -> tuple[list[list[int]], int]:
    """Tokens of a prompt's parts without the middle of the whole, and how many were left out.

    As in LongBench the first and the last half of `room` tokens stay, whatever parts they belong to.
    """
    excess = max(0, sum(map(len, parts)) - room)
    left_out, begin, kept = range(room // 2, room // 2 + excess), 0, []
    for part in parts:
        kept.append([token for place, token in enumerate(part, begin) if place not in left_out])
        begin += len(part)
    return kept, excess


def sample_of(prompt: Prompt) -> Sample:
    """The sample of a question's prompt."""
    assert prompt.sample is not None
    return prompt.sample
