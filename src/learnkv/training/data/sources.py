"""Where training contexts and their continuations come from."""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from learnkv.data.retrieval import Retrieval
from learnkv.errors import UserError
from learnkv.inference.models import format_prompt
from learnkv.training.data.text_windows import Text


class Continuation(NamedTuple):
    """Token ids read after a context; only the predictions of `answer` are distilled."""

    question: list[int]
    answer: list[int]


class Passage(NamedTuple):
    """Token ids of a context and of what may follow it."""

    context: list[int]
    continuations: list[Continuation]
    to_say: int = 0
    """Tokens of the answers that the model has still to give itself; 0: the answers are there."""


Source = Callable[[random.Random, int, int], Passage]
"""From a generator, the number of the passage, and a length: a passage whose context has about so many tokens."""


class NextText:
    """Natural text: the continuation is what really comes next.

    Args:
        text: what is read.
        tokens: length of the continuation.
    """

    def __init__(self, text: Text, tokens: int) -> None:
        self.text, self.tokens = text, tokens

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        ids = self.text.read(rng, row, length + self.tokens)
        context, rest = ids[:length], ids[length:]
        return Passage(context, [Continuation(rest[:1], rest[1:])])


class Spans:
    """Reconstruction: spans of the context are read again; their first tokens are the question, the rest the answer.

    Args:
        text: what is read.
        count: spans of one context.
        tokens: length of a span.
        cue: tokens of the span that are given.
    """

    def __init__(self, text: Text, count: int, tokens: int = 40, cue: int = 8) -> None:
        self.text, self.count, self.tokens, self.cue = text, count, tokens, cue

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        ids = self.text.read(rng, row, length)
        take = min(self.tokens, len(ids))
        spans = [ids[at : at + take] for at in (rng.randrange(len(ids) - take + 1) for _ in range(self.count))]
        cue = min(self.cue, take - 1)
        return Passage(ids, [Continuation(span[:cue], span[cue:]) for span in spans])


class Episodes:
    """Built-in retrieval episodes of one kind, written the way the model expects prompts.

    Args:
        kind: of `Retrieval.KINDS`.
        tokenizer: of the model.
        count: most continuations of an episode.
        hold_out: families, tasks or kinds of which nothing may be drawn; a kind that belongs to them is refused.
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
            context, asked, prefix = format_prompt(self.tokenizer, episode.context, question)
            continuations.append(Continuation(self._ids(asked + prefix), self._ids(answer)))
        return Passage(self._ids(context), continuations)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokens(self, text: str) -> int:
        return len(self._ids(text))


class OwnAnswers:
    """Documents and questions about them; the model answers from its full cache (self-study, arXiv 2506.06266).

    A context and a question together have the length asked for.

    Args:
        text: what is read.
        tokenizer: of the model.
        count: questions about one document.
        tokens: longest answer.
    """

    def __init__(self, text: Text, tokenizer: Any, count: int, tokens: int) -> None:
        self.text, self.tokenizer, self.tokens = text, tokenizer, tokens
        self.count = min(count, len(ASKS))
        parts = [format_prompt(tokenizer, "", ask) for ask in ASKS]
        self.template = len(self._ids(parts[0][0]))
        self.longest = max(len(self._ids(asked + prefix)) for _, asked, prefix in parts)

    def __call__(self, rng: random.Random, row: int, length: int) -> Passage:
        room = length - self.longest
        if room < 2 * self.template + 2:
            raise UserError(f"lengths: {length} tokens leave no room for a document beside a question about it")
        ids = self.text.read(rng, row, room - self.template)
        document = self.tokenizer.decode(ids, skip_special_tokens=True)
        parts = [format_prompt(self.tokenizer, document, ask) for ask in rng.sample(ASKS, self.count)]
        context = self._ids(parts[0][0])[:room]
        asked = [Continuation(self._ids(question + prefix), []) for _, question, prefix in parts]
        return Passage(context, asked, self.tokens)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


ASKS = (
    "\nWhat is this about?",
    "\nSum it up in a few words.",
    "\nWhich names and numbers occur?",
    "\nQuote one sentence of it.",
    "\nWhat is explained here, and how?",
    "\nAsk a question about it and answer it.",
    "\nWhat comes first, and what last?",
    "\nWhat should one remember of it?",
)
