"""Sources of training contexts and their continuations."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from learnkv.data.retrieval import Retrieval
from learnkv.errors import UserError
from learnkv.inference.prompt_format import format_prompt
from learnkv.training.data.text_windows import Text


class Continuation(NamedTuple):
    """Token ids after a context; only the predictions of `answer` are distilled."""

    question: list[int]
    answer: list[int]


class Passage(NamedTuple):
    """Token ids of a context and of its possible continuations."""

    context: list[int]
    continuations: list[Continuation]
    tokens_to_generate: int = 0
    """Length of the answers that the model has yet to generate; 0: the continuations are complete."""


Source = Callable[[random.Random, int, int], Passage]
"""(generator, number of the passage, length) -> passage whose context has about `length` tokens."""


class NextText:
    """Natural text: the continuation is the text that follows.

    Args:
        text: source of contexts.
        tokens: length of the continuation.
    """

    def __init__(self, text: Text, tokens: int) -> None:
        self.text, self.tokens = text, tokens

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        ids = self.text.read(rng, row, length + self.tokens)
        context, rest = ids[:length], ids[length:]
        return Passage(context, [Continuation(rest[:1], rest[1:])])


class Spans:
    """Reconstruction: spans of the context are repeated; their first tokens are the question, the rest the answer.

    Args:
        text: source of contexts.
        count: spans per context.
        tokens: length of a span.
        cue: length of the question.
    """

    def __init__(self, text: Text, count: int, tokens: int = 40, cue: int = 8) -> None:
        self.text, self.count, self.tokens, self.cue = text, count, tokens, cue

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        ids = self.text.read(rng, row, length)
        take = min(self.tokens, len(ids))
        starts = [rng.randrange(len(ids) - take + 1) for _ in range(self.count)]
        spans = [ids[start : start + take] for start in starts]
        cue = min(self.cue, take - 1)
        return Passage(ids, [Continuation(span[:cue], span[cue:]) for span in spans])


class Episodes:
    """Built-in retrieval episodes of one kind, in the model's prompt format.

    Args:
        kind: one of `Retrieval.KINDS`.
        tokenizer: the model's tokenizer.
        count: maximum number of continuations per episode.
        hold_out: excluded families, tasks or kinds; a kind that belongs to them is refused.
    """

    def __init__(self, kind: str, tokenizer: Any, count: int, hold_out: Sequence[str] = ()) -> None:
        self.kind, self.tokenizer, self.count, self.hold_out = kind, tokenizer, count, hold_out

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        maker = Retrieval(
            length,
            self._tokens,
            seed=rng.getrandbits(32),
            kinds={self.kind: 1.0},
            continuations=self.count,
            hold_out=self.hold_out,
        )
        episode = maker.episode(rng.getrandbits(32))
        context, continuations = "", []
        for question, answer in episode.continuations:
            context, formatted, prefix = format_prompt(self.tokenizer, episode.context, question)
            continuations.append(Continuation(self._ids(formatted + prefix), self._ids(answer)))
        return Passage(self._ids(context), continuations)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokens(self, text: str) -> int:
        return len(self._ids(text))


class OwnAnswers:
    """Documents and questions about them; the model answers from its full cache (self-study, arXiv 2506.06266).

    Context and question together have the requested length.

    Args:
        text: source of documents.
        tokenizer: the model's tokenizer.
        count: questions per document.
        tokens: maximum length of an answer.
    """

    def __init__(self, text: Text, tokenizer: Any, count: int, tokens: int) -> None:
        self.text, self.tokenizer, self.tokens = text, tokenizer, tokens
        self.count = min(count, len(QUESTIONS))
        parts = [format_prompt(tokenizer, "", question) for question in QUESTIONS]
        self.template = len(self._ids(parts[0][0]))
        self.longest = max(len(self._ids(question + prefix)) for _, question, prefix in parts)

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        room = length - self.longest
        if room < 2 * self.template + 2:
            raise UserError(f"lengths: {length} tokens leave no room for a document beside a question about it")
        ids = self.text.read(rng, row, room - self.template)
        document = self.tokenizer.decode(ids, skip_special_tokens=True)
        chosen = rng.sample(QUESTIONS, self.count)
        parts = [format_prompt(self.tokenizer, document, question) for question in chosen]
        context = self._ids(parts[0][0])[:room]
        continuations = [Continuation(self._ids(question + prefix), []) for _, question, prefix in parts]
        return Passage(context, continuations, self.tokens)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


QUESTIONS = (
    "\nWhat is this about?",
    "\nSum it up in a few words.",
    "\nWhich names and numbers occur?",
    "\nQuote one sentence of it.",
    "\nWhat is explained here, and how?",
    "\nAsk a question about it and answer it.",
    "\nWhat comes first, and what last?",
    "\nWhat should one remember of it?",
)
