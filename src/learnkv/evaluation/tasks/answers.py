"""Questions with known answers: generated greedily, judged by which answers occur in what was said."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from learnkv.cache.compressed_cache import CompressedCache
from learnkv.data.sample import Sample
from learnkv.evaluation.config import Setting
from learnkv.evaluation.tasks.base import Family, Prompt, pad
from learnkv.inference.generate import generate
from learnkv.inference.models import format_prompt

ROUND = 8
LOOP = 32
LONGEST_PERIOD = 24


class Answers(Family):
    """RULER-like tasks.

    Query-agnostic: the context is compressed, then question and answer prefix are read. Query-aware: context and
    question are compressed, then the answer prefix is read, or the question's last token where there is no prefix.
    """

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Any) -> None:
        super().__init__(prompts)
        self.tokenizer = tokenizer

    def effort(self, prompt: Prompt) -> tuple[int, ...]:
        """Length of the answers, then of the prompt."""
        return sum(map(len, _sample(prompt).answers)), len(prompt.read)

    def measure(
        self, model: Any, prompts: Sequence[Prompt], cache: CompressedCache, full: Any = None
    ) -> tuple[list[dict[str, Any]], Any]:
        """Score of what is said until the answer has ended; rows leave the batch as they end."""
        ends = EndOfAnswer(self.tokenizer, eos_tokens(model))
        said: list[list[int]] = [[] for _ in prompts]
        ids, mask = pad([prompt.then for prompt in prompts], "right", model.device)
        read: Tensor | None = mask
        live = list(range(len(prompts)))
        while True:
            new = generate(model, ids, cache, read, max_new_tokens=ROUND).tolist()
            for row, tokens in zip(live, new, strict=True):
                said[row] = ends.cut(said[row] + tokens, _sample(prompts[row]))
            going = [at for at, row in enumerate(live) if not ends(said[row], _sample(prompts[row]))]
            if not going:
                break
            if len(going) < len(live):
                live = [live[at] for at in going]
                cache.batch_select_indices(torch.tensor(going, device=model.device))
            # The next round reads what was said last; as an unread end of a turn it would be read twice.
            cache.pending = None
            ids, read = torch.tensor([said[row][-1:] for row in live], device=model.device), None
        texts = [ends.text(tokens) for tokens in said]
        return [
            {"score": 100 * _sample(prompt).score(text), "answer": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ], None


class EndOfAnswer:
    """Says whether generated tokens are a complete answer.

    An answer ends at an EOS token, at its sample's token limit, where all answers have been found (nothing that may
    still follow can change the score), and where a greedy model has run into a loop: the same thing three times over
    and `LOOP` tokens long. A sentence or a line may end in the middle of an answer, so that neither counts.
    """

    def __init__(self, tokenizer: Any, eos: set[int]) -> None:
        self.tokenizer, self.eos = tokenizer, eos

    def __call__(self, said: list[int], sample: Sample) -> bool:
        limit = len(said) >= sample.max_new_tokens or said[-1] in self.eos
        return limit or loops(said) or sample.score(self.text(said)) == 1

    def cut(self, said: list[int], sample: Sample) -> list[int]:
        """Tokens up to the first EOS token and the sample's limit."""
        end = next((at + 1 for at, token in enumerate(said) if token in self.eos), len(said))
        return said[: min(end, sample.max_new_tokens)]

    def text(self, said: list[int]) -> str:
        """What was said, without special tokens."""
        return str(self.tokenizer.decode(said, skip_special_tokens=True))


def loops(said: Sequence[int]) -> bool:
    """Whether the last `LOOP` tokens or more are the same few tokens, verbatim, at least three times over."""
    for period in range(1, LONGEST_PERIOD + 1):
        span = max(LOOP, 3 * period)
        if len(said) >= span and said[len(said) - span + period :] == said[len(said) - span : -period]:
            return True
    return False


def eos_tokens(model: Any) -> set[int]:
    """The tokens at which `generate` ends a row."""
    eos = model.generation_config.eos_token_id
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def tokenised(
    samples: Iterable[tuple[int, Sample]], setting: Setting, length: int, tokenizer: Any, haystack: str | None = None
) -> Iterator[Prompt]:
    """Prompts of numbered samples in one setting, tokenised part by part so that both settings read the same tokens."""
    for index, sample in samples:
        parts = format_prompt(tokenizer, sample.context, sample.question, sample.answer_prefix)
        context, question, prefix = (tokenizer(part, add_special_tokens=False).input_ids for part in parts)
        whole = context + question + prefix
        cut = len(context) if setting == "query_agnostic" else len(context) + len(question)
        cut = min(cut, len(whole) - 1)
        yield Prompt(sample.task, length, setting, index, whole[:cut], whole[cut:], sample, haystack)


def _sample(prompt: Prompt) -> Sample:
    assert prompt.sample is not None
    return prompt.sample
