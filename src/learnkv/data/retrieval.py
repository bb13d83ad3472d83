"""Retrieval episodes for training: a context and several continuations that need parts of it.

All strings are sampled with split="train", no sentence is one of the evaluation's, and the haystack is the standard
library's docstrings, so that episodes exist on every machine and for every tokenizer.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

from learnkv.data import words
from learnkv.data.fitting import largest_fitting
from learnkv.data.haystack import docstrings, sentences
from learnkv.data.retrieval_text import CHAIN_LINK, CHAIN_QUESTION, FACTS, FILLER, SPAN_QUESTIONS
from learnkv.errors import UserError

Continuation = tuple[str, str]


@dataclass(frozen=True)
class Episode:
    """A context and its (question, answer) continuations, each directly after the context.

    An answer begins with its space; a question may be empty.
    """

    context: str
    continuations: list[Continuation]
    kind: str


@dataclass(frozen=True)
class Hidden:
    """Sentences to hide, the continuations about them, and a generator of distractors, if there is one."""

    facts: list[str]
    continuations: list[Continuation]
    more: Callable[[], str] | None = None


FAMILIES: dict[str, tuple[str, ...]] = {
    "niah": ("needle", "crowd", "codes", "values"),
    "vt": ("chain",),
    "cwe": (),
    "fwe": (),
    "qa": (),
}
"""RULER's task families, and the kinds of episodes that train for them."""


def held_out_kinds(hold_out: Sequence[str]) -> set[str]:
    """Kinds excluded by held-out RULER families, tasks of them (`niah_multikey_1`) or kinds."""
    kinds: set[str] = set()
    for name in hold_out:
        family = next((key for key in FAMILIES if name == key or name.startswith(f"{key}_")), None)
        if family is None and name not in Retrieval.KINDS:
            names = ", ".join([*FAMILIES, *Retrieval.KINDS])
            raise UserError(f"hold_out={name}: expected a task family, one of its tasks, or a kind: {names}")
        kinds |= {name} if family is None else set(FAMILIES[family])
    return kinds


def count_words(text: str) -> int:
    """Size of a text in words, the default without a tokenizer."""
    return len(text.split())


class Retrieval:
    """Generator of episodes: `episode(index)` is a function of its argument and of the ones here.

    Args:
        length: maximum size of a context, filled closely, in units of `count`.
        count: size of a text; words by default, tokens with `lambda text: len(tokenizer(text).input_ids)`.
        seed: seed of all episodes.
        kinds: kind -> weight, of "needle", "crowd" (facts only), "codes" (the same with UUIDs as keys and values; not
            in the default), "values", "chain", "span" and "next".
        continuations: maximum number of continuations per episode.
        hold_out: excluded families, tasks or kinds.
    """

    KINDS = ("needle", "crowd", "codes", "values", "chain", "span", "next")

    def __init__(
        self,
        length: int,
        count: Callable[[str], int] = count_words,
        *,
        seed: int = 0,
        kinds: dict[str, float] | None = None,
        continuations: int = 4,
        hold_out: Sequence[str] = (),
    ):
        held_out = held_out_kinds(hold_out)
        self.kinds = {"needle": 3.0, "crowd": 1.5, "values": 1.5, "chain": 1.5, "span": 1.5, "next": 0.5}
        if kinds is None:
            self.kinds = {kind: weight for kind, weight in self.kinds.items() if kind not in held_out}
        else:
            self.kinds = dict(kinds)
        unknown = sorted(set(self.kinds) - set(self.KINDS))
        if unknown or not any(weight > 0 for weight in self.kinds.values()):
            raise UserError(f"kinds={kinds}: expected weights, one above 0, of {', '.join(self.KINDS)}")
        if refused := sorted(held_out & {kind for kind, weight in self.kinds.items() if weight > 0}):
            raise UserError(f"hold_out={','.join(hold_out)}: {', '.join(refused)} would be drawn")
        if continuations < 1:
            raise UserError(f"continuations={continuations}: expected at least 1")
        self.length, self.count, self.seed, self.max_continuations = length, count, seed, continuations

    def episode(self, index: int) -> Episode:
        """Episode number `index`, with fewer facts where not all of them fit. Raises UserError if not even one fits."""
        for most in range(self.max_continuations, 0, -1):
            rng = random.Random(f"{self.seed}:retrieval:{index}")
            kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
            if kind in ("span", "next"):
                return self._passage_episode(kind, rng)
            hidden = self._hidden(kind, most, rng)
            context = self._context(hidden, rng)
            if context is not None:
                return Episode(context, hidden.continuations, kind)
        raise UserError(f"length={self.length}: the facts of an episode take {self.count(' '.join(hidden.facts))}")

    def _hidden(self, kind: str, most: int, rng: random.Random) -> Hidden:
        if kind == "needle":
            return self._needle(most, rng)
        if kind in ("crowd", "codes"):
            return self._crowd(most, _FactMaker(rng, ("uuids", "uuids") if kind == "codes" else None))
        return self._values(rng) if kind == "values" else self._chain(rng)

    def _needle(self, most: int, rng: random.Random) -> Hidden:
        """Some facts with different keys."""
        make = _FactMaker(rng)
        pairs = [make.pair() for _ in range(rng.randint(1, most + 1))]
        queried = rng.sample(pairs, min(most, len(pairs)))
        return Hidden([make.sentence(*pair) for pair in pairs], [make.continuation(*pair) for pair in queried])

    @staticmethod
    def _crowd(most: int, make: "_FactMaker") -> Hidden:
        """Facts only, as many as fit."""
        pairs = [make.pair() for _ in range(most)]
        return Hidden(
            [make.sentence(*pair) for pair in pairs],
            [make.continuation(*pair) for pair in pairs],
            lambda: make.sentence(*make.pair()),
        )

    def _values(self, rng: random.Random) -> Hidden:
        """Several values of one key, answered in the order of the context."""
        fact, taken = rng.choice(FACTS), set[str]()
        key = words.key_word(rng, "train", taken)
        values = [words.number(rng, "train", taken) for _ in range(rng.randint(2, 4))]
        facts = [fact.sentence.format(key=key, value=value) for value in values]
        return Hidden(facts, [(fact.question_all.format(key=key), f" {', '.join(values)}.")])

    def _chain(self, rng: random.Random) -> Hidden:
        """A value passed along a chain of variables."""
        taken: set[str] = set()
        start = words.number(rng, "train", taken, digits=5)
        names = [words.variable(rng, "train", taken) for _ in range(rng.randint(3, 5))]
        links = [CHAIN_LINK.format(source=a, target=b) for a, b in zip([start, *names], names, strict=False)]
        return Hidden(links, [(CHAIN_QUESTION.format(source=start), f" {' '.join(names)}.")])

    def _context(self, hidden: Hidden, rng: random.Random) -> str | None:
        """The facts, in order, at random positions of text that fills the context; None if they do not fit."""
        depths = sorted(rng.random() for _ in hidden.facts)
        text = self._text(hidden, rng)

        def context(units: int) -> str:
            parts = text(units)
            size = len(parts) + 1
            for depth, fact in zip(reversed(depths), reversed(hidden.facts), strict=True):
                parts.insert(int(depth * size), fact)
            return " ".join(parts)

        units = largest_fitting(lambda n: self.count(context(n)), self.length)
        return None if units is None else context(units)

    def _text(self, hidden: Hidden, rng: random.Random) -> Callable[[int], list[str]]:
        """Haystack of any size: more facts, sentences of filler or words of docstrings."""
        if hidden.more:
            return partial(_extended, [], hidden.more)
        if rng.random() < 0.25:
            return lambda units: list(islice(cycle(FILLER), units))
        return partial(_first_words, _passage(rng, self.length))

    def _passage_episode(self, kind: str, rng: random.Random) -> Episode:
        """A passage with spans of it to repeat, or with the text that follows."""
        passage = " ".join(_passage(rng, self.length)).split(" ")
        # at most one word per unit, so the passage is long enough for the context and what follows
        size = largest_fitting(lambda n: self.count(" ".join(passage[:n])), self.length, len(passage) - NEXT_WORDS)
        assert size is not None
        context = passage[:size]
        if kind == "next":
            return Episode(" ".join(context), [("", " " + " ".join(passage[size : size + NEXT_WORDS]))], kind)
        wording, continuations = rng.choice(SPAN_QUESTIONS), []
        for _ in range(self.max_continuations):
            lead = rng.randint(3, 6)
            take = min(rng.randint(8, 32), max(1, size // 4))
            begin = rng.randrange(max(1, size - lead - take))
            start, rest = context[begin : begin + lead], context[begin + lead : begin + lead + take]
            if rest:
                continuations.append((wording.format(start=" ".join(start)), " " + " ".join(rest)))
        return Episode(" ".join(context), continuations, kind)


NEXT_WORDS = 48


class _FactMaker:
    """Distinct facts of one wording, one kind of keys and one kind of values; `kinds` are sampled if not given."""

    def __init__(self, rng: random.Random, kinds: tuple[str, str] | None = None):
        self.rng, self.fact, self.taken = rng, rng.choice(FACTS), set[str]()
        choices = (("words", "numbers"), ("words", "uuids"), ("words", "words"), ("uuids", "uuids"))
        self.kinds = kinds or rng.choices(choices, (6, 2, 1, 1))[0]

    def pair(self) -> tuple[str, str]:
        key, value = (words.value(kind, self.rng, "train", self.taken) for kind in self.kinds)
        return key, value

    def sentence(self, key: str, value: str) -> str:
        return self.fact.sentence.format(key=key, value=value)

    def continuation(self, key: str, value: str) -> Continuation:
        return self.fact.question.format(key=key), f" {value}."


def _extended(items: list[str], make: Callable[[], str], count: int) -> list[str]:
    while len(items) < count:
        items.append(make())
    return items[:count]


def _passage(rng: random.Random, words_wanted: int) -> list[str]:
    """Sentences of consecutive docstrings from a random one on, with more than `words_wanted` words."""
    texts = docstrings()
    index, passage, size = rng.randrange(len(texts)), list[str](), 0
    while size < words_wanted + 2 * NEXT_WORDS:
        passage += sentences(texts[index % len(texts)])
        size += count_words(texts[index % len(texts)])
        index += 1
    return passage


def _first_words(passage: Sequence[str], count: int) -> list[str]:
    """Sentences up to `count` words in total, the last one truncated."""
    kept: list[str] = []
    for sentence in passage:
        if count <= 0:
            break
        kept.append(" ".join(sentence.split(" ")[:count]))
        count -= len(sentence.split(" "))
    return kept
