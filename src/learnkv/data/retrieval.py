"""Retrieval episodes to train predictors on: a context and several continuations that need parts of it.

Everything is drawn with split="train", no sentence is one of the evaluation's, and the text among which facts are
hidden is the standard library's docstrings, so episodes exist on every machine and under every tokenizer.
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
    """A context and (question, answer) continuations of it, each to be read right after the context.

    An answer begins with its space; a question may be empty. `kind` names what the answers take to find.
    """

    context: str
    continuations: list[Continuation]
    kind: str


@dataclass(frozen=True)
class Hidden:
    """Sentences to hide, the continuations that ask for them, and what makes more of the same, if anything does."""

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
"""RULER's task families, and the kinds of episodes that practise them."""


def held_out_kinds(hold_out: Sequence[str]) -> set[str]:
    """Kinds that must not be drawn where RULER's families, tasks of them (`niah_multikey_1`) or kinds are held out."""
    found: set[str] = set()
    for name in hold_out:
        family = next((one for one in FAMILIES if name == one or name.startswith(f"{one}_")), None)
        if family is None and name not in Retrieval.KINDS:
            known = ", ".join([*FAMILIES, *Retrieval.KINDS])
            raise UserError(f"hold_out={name}: expected a task family, one of its tasks, or a kind: {known}")
        found |= {name} if family is None else set(FAMILIES[family])
    return found


def count_words(text: str) -> int:
    """Size of a text in words, for those who have no tokenizer yet."""
    return len(text.split())


class Retrieval:
    """Generator of episodes: `episode(index)` is a function of its argument and of the ones here.

    Args:
        length: largest size of a context, filled closely, in units of `count`.
        count: size of a text; words by default, tokens with `lambda text: len(tokenizer(text).input_ids)`.
        seed: of everything drawn.
        kinds: kind -> weight, of "needle", "crowd" (nothing but facts), "codes" (the same with UUIDs for keys and
            values; by default none are drawn), "values", "chain", "span" and "next".
        continuations: most continuations of an episode.
        hold_out: families, tasks or kinds of which nothing may be drawn.
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
        if drawn := sorted(held_out & {kind for kind, weight in self.kinds.items() if weight > 0}):
            raise UserError(f"hold_out={','.join(hold_out)}: {', '.join(drawn)} would be drawn")
        if continuations < 1:
            raise UserError(f"continuations={continuations}: expected at least 1")
        self.length, self.count, self.seed, self.most = length, count, seed, continuations

    def episode(self, index: int) -> Episode:
        """Episode number `index`, with fewer facts where not all of them fit. Raises UserError if not even one does."""
        for most in range(self.most, 0, -1):
            rng = random.Random(f"{self.seed}:retrieval:{index}")
            kind = rng.choices(list(self.kinds), list(self.kinds.values()))[0]
            if kind in ("span", "next"):
                return self._read(kind, rng)
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
        """Some facts with keys of their own."""
        make = _FactMaker(rng)
        pairs = [make.pair() for _ in range(rng.randint(1, most + 1))]
        asked = rng.sample(pairs, min(most, len(pairs)))
        return Hidden([make.say(*pair) for pair in pairs], [make.ask(*pair) for pair in asked])

    @staticmethod
    def _crowd(most: int, make: "_FactMaker") -> Hidden:
        """As many facts as fit."""
        pairs = [make.pair() for _ in range(most)]
        return Hidden(
            [make.say(*pair) for pair in pairs], [make.ask(*pair) for pair in pairs], lambda: make.say(*make.pair())
        )

    def _values(self, rng: random.Random) -> Hidden:
        """Several values of a key, answered in the order in which they stand."""
        fact, taken = rng.choice(FACTS), set[str]()
        key = words.key_word(rng, "train", taken)
        values = [words.number(rng, "train", taken) for _ in range(rng.randint(2, 4))]
        told = [fact.sentence.format(key=key, value=value) for value in values]
        return Hidden(told, [(fact.question_all.format(key=key), f" {', '.join(values)}.")])

    def _chain(self, rng: random.Random) -> Hidden:
        """A number passed along from name to name."""
        taken: set[str] = set()
        start = words.number(rng, "train", taken, digits=5)
        names = [words.variable(rng, "train", taken) for _ in range(rng.randint(3, 5))]
        links = [CHAIN_LINK.format(source=a, target=b) for a, b in zip([start, *names], names, strict=False)]
        return Hidden(links, [(CHAIN_QUESTION.format(source=start), f" {' '.join(names)}.")])

    def _context(self, hidden: Hidden, rng: random.Random) -> str | None:
        """The facts, in their order, at random places of text that fills the context; None if they do not fit."""
        places = sorted(rng.random() for _ in hidden.facts)
        text = self._text(hidden, rng)

        def context(units: int) -> str:
            told = text(units)
            size = len(told) + 1
            for place, fact in zip(reversed(places), reversed(hidden.facts), strict=True):
                told.insert(int(place * size), fact)
            return " ".join(told)

        units = largest_fitting(lambda n: self.count(context(n)), self.length)
        return None if units is None else context(units)

    def _text(self, hidden: Hidden, rng: random.Random) -> Callable[[int], list[str]]:
        """What surrounds the facts: any number of more facts, sentences of filler or words of docstrings."""
        if hidden.more:
            return partial(_grown, [], hidden.more)
        if rng.random() < 0.25:
            return lambda units: list(islice(cycle(FILLER), units))
        return partial(_cut, _passage(rng, self.length))

    def _read(self, kind: str, rng: random.Random) -> Episode:
        """A passage with spans of it to repeat, or with the text that comes next."""
        told = " ".join(_passage(rng, self.length)).split(" ")
        # at most one word per unit, so the passage is long enough for the context and what follows
        size = largest_fitting(lambda n: self.count(" ".join(told[:n])), self.length, len(told) - NEXT_WORDS)
        assert size is not None
        context = told[:size]
        if kind == "next":
            return Episode(" ".join(context), [("", " " + " ".join(told[size : size + NEXT_WORDS]))], kind)
        wording, found = rng.choice(SPAN_QUESTIONS), []
        for _ in range(self.most):
            lead = rng.randint(3, 6)
            take = min(rng.randint(8, 32), max(1, size // 4))
            at = rng.randrange(max(1, size - lead - take))
            start, rest = context[at : at + lead], context[at + lead : at + lead + take]
            if rest:
                found.append((wording.format(start=" ".join(start)), " " + " ".join(rest)))
        return Episode(" ".join(context), found, kind)


NEXT_WORDS = 48


class _FactMaker:
    """Facts of one wording, one kind of keys and one kind of values, all distinct; without `kinds` they are drawn."""

    def __init__(self, rng: random.Random, kinds: tuple[str, str] | None = None):
        self.rng, self.fact, self.taken = rng, rng.choice(FACTS), set[str]()
        drawn = (("words", "numbers"), ("words", "uuids"), ("words", "words"), ("uuids", "uuids"))
        self.kinds = kinds or rng.choices(drawn, (6, 2, 1, 1))[0]

    def pair(self) -> tuple[str, str]:
        key, value = (words.value(kind, self.rng, "train", self.taken) for kind in self.kinds)
        return key, value

    def say(self, key: str, value: str) -> str:
        return self.fact.sentence.format(key=key, value=value)

    def ask(self, key: str, value: str) -> Continuation:
        return self.fact.question.format(key=key), f" {value}."


def _grown(items: list[str], make: Callable[[], str], count: int) -> list[str]:
    while len(items) < count:
        items.append(make())
    return items[:count]


def _passage(rng: random.Random, words_wanted: int) -> list[str]:
    """Sentences of consecutive docstrings from a random one on, at least `words_wanted` words and some to spare."""
    texts = docstrings()
    at, told, size = rng.randrange(len(texts)), list[str](), 0
    while size < words_wanted + 2 * NEXT_WORDS:
        told += sentences(texts[at % len(texts)])
        size += count_words(texts[at % len(texts)])
        at += 1
    return told


def _cut(told: Sequence[str], count: int) -> list[str]:
    """Sentences up to `count` words in all, the last one cut short."""
    kept: list[str] = []
    for sentence in told:
        if count <= 0:
            break
        kept.append(" ".join(sentence.split(" ")[:count]))
        count -= len(sentence.split(" "))
    return kept
