"""What a training row asks for: needles to hide and the questions that find them, as token ids.

The wording is RULER's (`ruler_text`) or the training episodes' (`retrieval_text`); every key, value and name is
drawn with split="train".
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from learnkv.data import ruler_text, words
from learnkv.data.retrieval_text import CHAIN_LINK, CHAIN_QUESTION, FACTS

ORDINALS = ("first", "second", "third", "fourth")

Ids = list[int]
Question = tuple[Ids, Ids]


@dataclass(frozen=True)
class Difficulty:
    """How hard the questions of a stage are.

    Args:
        needles: most needles among text; a haystack of needles takes as many as fit.
        digits: smallest and largest number of digits of a number.
        hops: smallest and largest number of hops of a chain.
        brief: probability that a question is cut down to its answer prefix.
    """

    needles: int = 6
    digits: tuple[int, int] = (7, 7)
    hops: tuple[int, int] = (4, 4)
    brief: float = 0.3


@dataclass
class Ask:
    """Needles, which keep their order, the (question, answer) pairs about them, and what opens the context."""

    needles: list[Ids] = field(default_factory=list)
    questions: list[Question] = field(default_factory=list)
    intro: Ids = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(map(len, self.needles)) + sum(len(q) + len(a) for q, a in self.questions) + len(self.intro)


class Asker:
    """Draws an `Ask` for a row of `length` tokens; short rows get easier ones.

    Args:
        encode: tokenizer without special tokens.
        eos: the token that ends every answer.
        level: how hard the questions are.
        rng: where every random choice comes from.
        length: tokens of the row.
    """

    def __init__(self, encode: Callable[[str], Ids], eos: int, level: Difficulty, rng: random.Random, length: int):
        self.encode, self.eos, self.level, self.rng, self.length = encode, eos, level, rng, length
        self.taken: set[str] = set()

    def single(self) -> Ask:
        """Needles with keys of their own, all of them asked for one by one."""
        rng = self.rng
        count = rng.choice((1, rng.randint(1, self.level.needles)))
        make, say, ask, intro = self._facts()
        pairs = [make() for _ in range(count)]
        return Ask([say(*p) for p in pairs], [ask(*p) for p in rng.sample(pairs, count)], intro)

    def dense(self) -> Ask:
        """As many needles as fit, some of them asked for."""
        make, say, ask, intro = self._facts()
        found = Ask(intro=intro)
        while not found.needles or found.size < self.length // 3:
            pair = make()
            found.needles.append(say(*pair))
            found.questions.append(ask(*pair))
        room = self.length - found.size
        while (needle := say(*make())) and len(needle) <= room:
            found.needles.append(needle)
            room -= len(needle)
        self.rng.shuffle(found.needles)
        return found

    def multivalue(self) -> Ask:
        """Several values of one key, asked for at once and answered in the order in which they were written.

        In RULER's wording every value is announced by its ordinal, which says what to look for next.
        """
        rng = self.rng
        wording = ruler_text.NeedleWording("numbers", many=True)
        fact = rng.choice(FACTS) if rng.random() < 0.2 else None
        key = words.key_word(rng, "train", self.taken)
        values = [self._number() for _ in range(self._count())]
        if fact:
            told = [fact.sentence.format(key=key, value=value) for value in values]
            question, answer = fact.question_all.format(key=key), ", ".join(values)
        else:
            told = [wording.needle(key, value) for value in values]
            question = self._question(wording.question([key]), wording.answer_prefix([key]))
            answer = ", ".join(f"{ordinal} {value}" for ordinal, value in zip(ORDINALS, values, strict=False))
        intro = [] if fact else self._intro(wording.intro)
        return Ask(self._needles(told), [(self.encode(question), self._answer(answer))], intro)

    def multiquery(self) -> Ask:
        """Several keys asked for at once, each answered with its key before its value."""
        rng = self.rng
        wording = ruler_text.NeedleWording("numbers", many=True)
        count = self._count()
        pairs = [(words.key_word(rng, "train", self.taken), self._number()) for _ in range(count)]
        told = [wording.needle(*pair) for pair in pairs]
        rng.shuffle(pairs)
        keys = [key for key, _ in pairs]
        question = self._question(wording.question(keys), wording.answer_prefix(keys))
        answer = self._answer(", ".join(f"{key} is {value}" for key, value in pairs))
        return Ask(self._needles(told), [(self.encode(question), answer)], self._intro(wording.intro))

    def chain(self) -> Ask:
        """A value copied from variable to variable; the names are asked for in order."""
        rng = self.rng
        hops = rng.randint(*self.level.hops)
        value = words.number(rng, "train", self.taken, 5)
        names = [words.variable(rng, "train", self.taken) for _ in range(hops + 1)]
        intro: Ids = []
        if rng.random() < 0.3:
            told = [CHAIN_LINK.format(source=a, target=b) for a, b in zip([value, *names], names, strict=False)]
            question = CHAIN_QUESTION.format(source=value)
        else:
            told = ruler_text.chain_statements(value, names)
            question = self._question(ruler_text.chain_question(value), ruler_text.chain_prefix(value, len(names)))
            intro = self._intro(ruler_text.CHAIN_INTRO)
            if intro and self.length >= 384 and rng.random() < 0.7:
                shown = [words.variable(rng, "train", self.taken, letters=3) for _ in range(hops + 1)]
                intro = intro + self.encode(ruler_text.chain_example(shown))
        return Ask(self._needles(told), [(self.encode(question), self._answer(" ".join(names)))], intro)

    def lists(self) -> Ask:
        """Several questions with several answers each."""
        return self._several((self.multivalue, self.multiquery), (3, 2))

    def mixed(self) -> Ask:
        """Several of the above at once: many answers for one context."""
        return self._several((self.single, self.multivalue, self.multiquery, self.chain), (2, 3, 1.5, 3))

    def _several(self, kinds: tuple[Callable[[], Ask], ...], weights: tuple[float, ...]) -> Ask:
        """As many asks of some kinds as fill most of the row, their needles in one another's midst."""
        rng, found = self.rng, Ask()
        while True:
            more = rng.choices(kinds, weights)[0]()
            if found.needles and found.size + more.size > 0.8 * self.length:
                break
            turns = [found.needles] * len(found.needles) + [more.needles] * len(more.needles)
            rng.shuffle(turns)
            found.needles = [turn.pop(0) for turn in turns]
            found.questions += more.questions
            found.intro = found.intro or more.intro
        rng.shuffle(found.questions)
        return found

    def _facts(self) -> tuple[Callable[[], tuple[str, str]], Callable[..., Ids], Callable[..., Question], Ids]:
        """What makes (key, value) pairs, says them and asks for them, and the intro, in one wording."""
        rng = self.rng
        long = self.length >= 256
        kinds = (("words", "numbers"), ("words", "uuids"), ("words", "words"), ("uuids", "uuids"))
        key_kind, value_kind = rng.choices(kinds, (6, 2.5 * long, 0.7, 3 * long))[0]
        wording = ruler_text.NeedleWording(value_kind)
        fact = rng.choice(FACTS) if rng.random() < 0.4 else None

        def make() -> tuple[str, str]:
            key = words.value(key_kind, rng, "train", self.taken)
            number = value_kind == "numbers"
            return key, self._number() if number else words.value(value_kind, rng, "train", self.taken)

        def say(key: str, value: str) -> Ids:
            told = fact.sentence.format(key=key, value=value) if fact else wording.needle(key, value)
            return self.encode(" " + told)

        def ask(key: str, value: str) -> Question:
            if fact:
                return self.encode(fact.question.format(key=key)), self._answer(value)
            question = self._question(wording.question([key]), wording.answer_prefix([key]))
            return self.encode(question), self._answer(value)

        return make, say, ask, [] if fact else self._intro(wording.intro)

    def _needles(self, told: list[str]) -> list[Ids]:
        return [self.encode(" " + sentence) for sentence in told]

    def _count(self) -> int:
        if self.length < 128:
            return 2
        return 4 if self.rng.random() < 0.6 else self.rng.randint(2, 4)

    def _number(self) -> str:
        return words.number(self.rng, "train", self.taken, self.rng.randint(*self.level.digits))

    def _question(self, question: str, prefix: str) -> str:
        return "\n" + prefix[1:] if self.rng.random() < self.level.brief else question + prefix

    def _intro(self, intro: str) -> Ids:
        return self.encode(intro) if self.length >= 160 and self.rng.random() < 0.7 else []

    def _answer(self, text: str) -> Ids:
        return [*self.encode(f" {text}."), self.eos]
