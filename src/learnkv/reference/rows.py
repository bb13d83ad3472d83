"""Training rows of the reference model: text, repetition and retrieval, as token ids with the labels that count.

A row is `(ids, labels)`, two integer arrays of exactly `length` tokens; labels are -100 where nothing is asked.
Every key, value and name is drawn with split="train"; the haystack is the training text, never the help topics.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerFast

from learnkv.data import ruler_text, words
from learnkv.data.haystack import NOISE
from learnkv.data.retrieval_text import CHAIN_LINK, CHAIN_QUESTION, FACTS, SPAN_QUESTIONS

IGNORE = -100
Row = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum: row lengths, kinds of rows with their weights, and how hard they are.

    Args:
        steps: optimizer steps of this stage.
        lengths: row length in tokens -> weight; every step draws one and fills `tokens_per_step` with such rows.
        kinds: kind of row (a method of `RowMaker`) -> weight.
        needles: most needles among text; a haystack of needles takes as many as fit.
        digits: smallest and largest number of digits of a number.
        hops: smallest and largest number of hops of a chain.
        brief: probability that a question is cut down to its answer prefix.
    """

    steps: int
    lengths: dict[int, float]
    kinds: dict[str, float]
    needles: int = 6
    digits: tuple[int, int] = (7, 7)
    hops: tuple[int, int] = (4, 4)
    brief: float = 0.3


@dataclass
class Asked:
    """Token pieces of the questions that follow a context, labels on the answers only."""

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, question: list[int], answer: list[int]) -> None:
        self.ids += question + answer
        self.labels += [IGNORE] * len(question) + answer


class RowMaker:
    """Makes rows from one pool of tokenised text.

    Args:
        tokenizer: the reference model's tokenizer.
        pool: token ids of the training text, one flat array.
        stage: how long and how hard the rows are.
        rng: where every random choice comes from.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, pool: np.ndarray, stage: Stage, rng: random.Random):
        self.pool, self.stage, self.rng = pool, stage, rng
        self.encode = _encoder(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.starts_word = _starts_word(tokenizer)
        self.vocab_size = len(tokenizer)

    def row(self, kind: str, length: int) -> Row:
        """A row of `kind` ("text", "repeat", "span", "single", "dense", "multivalue", "multiquery", "chain")."""
        ids, labels = getattr(self, kind)(length - 1)
        assert len(ids) == len(labels) == length - 1, f"{kind}: {len(ids)} tokens instead of {length - 1}"
        return np.array([self.bos, *ids]), np.array([IGNORE, *labels])

    def text(self, length: int) -> tuple[list[int], list[int]]:
        ids = self._passage(length)
        return ids, ids

    def repeat(self, length: int) -> tuple[list[int], list[int]]:
        """A segment repeated with a random period: what makes heads look back."""
        rng = self.rng
        period = rng.randint(max(4, length // 8), 3 * length // 4)
        material = rng.choices(("text", "tokens", "digits", "hex", "names"), (4, 2, 1, 1.5, 1.5))[0]
        if material == "text":
            segment = self._passage(period)
        elif material == "tokens":
            segment = [rng.randrange(2, self.vocab_size) for _ in range(period)]
        else:
            segment = []
            while len(segment) < period:
                if material == "digits":
                    segment += self.encode(" " + str(rng.randrange(10 ** rng.randint(1, 12))))
                elif material == "hex":
                    segment += self.encode(" " + words.random_uuid(rng, "train"))
                else:
                    name = words.variable if rng.random() < 0.5 else words.key_word
                    segment += self.encode(" " + name(rng, "train"))
            segment = segment[:period]
        ids = (segment * (length // period + 1))[:length]
        return ids, [IGNORE] * (period + 1) + ids[period + 1 :]

    def span(self, length: int) -> tuple[list[int], list[int]]:
        """A passage, then spans of it asked for by their first words."""
        rng = self.rng
        context = self._passage(length)
        asked, wording = Asked(), rng.choice(SPAN_QUESTIONS)
        opening = self.encode(wording.format(start="").rstrip(" "))
        for _ in range(1 if length < 128 else 3):
            take, lead = min(rng.randint(12, 48), length // 5), rng.randint(3, 8)
            room = length - len(asked.ids) - len(opening) - lead - take
            if room < lead + take + 8:
                break
            at = self._word_start(context[:room], 0, room - lead - take)
            asked.add(opening + context[at : at + lead], context[at + lead : at + lead + take])
        room = length - len(asked.ids)
        return context[:room] + asked.ids, [IGNORE] * room + asked.labels

    def single(self, length: int) -> tuple[list[int], list[int]]:
        """Needles with keys of their own in text, in noise or in both; several of them are asked for."""
        rng = self.rng
        count = rng.choice((1, rng.randint(1, self.stage.needles)))
        say, ask, pairs, intro = self._facts(length, count)
        needles = [say(key, value) for key, value in pairs]
        return self._place(length, intro, needles, [ask(key, value) for key, value in rng.sample(pairs, count)])

    def dense(self, length: int) -> tuple[list[int], list[int]]:
        """As many needles as fit and nothing else."""
        say, ask, pairs, intro = self._facts(length, length // 16 + 1)
        questions = [ask(k, v) for k, v in pairs[: 2 + length // 200]]
        room = length - len(intro) - sum(len(q) + len(a) for q, a in questions)
        needles: list[list[int]] = []
        for key, value in pairs:
            needle = say(key, value)
            if len(needle) > room:
                break
            needles.append(needle)
            room -= len(needle)
        self.rng.shuffle(needles)
        return self._place(length, intro, needles, questions[: len(needles)])

    def multivalue(self, length: int) -> tuple[list[int], list[int]]:
        """Several values of one key, asked for at once and answered in the order in which they were written."""
        rng, digits = self.rng, self._digits()
        wording = ruler_text.NeedleWording("numbers", many=True)
        fact = rng.choice(FACTS) if rng.random() < 0.4 else None
        taken: set[str] = set()
        needles, questions = [], []
        for _ in range(1 if length < 256 else rng.choice((1, 1, 2))):
            key = words.key_word(rng, "train", taken)
            count = rng.randint(2, 4 if length > 128 else 2)
            values = [words.number(rng, "train", taken, digits) for _ in range(count)]
            if fact:
                needles.append([self.encode(" " + fact.sentence.format(key=key, value=v)) for v in values])
                question = fact.question_all.format(key=key)
            else:
                needles.append([self.encode(" " + wording.needle(key, v)) for v in values])
                question = self._question(wording.question([key]), wording.answer_prefix([key]))
            questions.append((self.encode(question), self._answer(", ".join(values))))
        intro = [] if fact else self._intro(length, wording.intro)
        return self._place(length, intro, self._merged(needles), questions)

    def multiquery(self, length: int) -> tuple[list[int], list[int]]:
        """Several keys asked for at once, each answered with its key before its value."""
        rng, digits = self.rng, self._digits()
        wording = ruler_text.NeedleWording("numbers", many=True)
        taken: set[str] = set()
        count = rng.randint(2, 4 if length > 300 else 2)
        pairs = [
            (words.key_word(rng, "train", taken), words.number(rng, "train", taken, digits))
            for _ in range(count if length < 300 else rng.randint(count, max(count, self.stage.needles)))
        ]
        needles = [self.encode(" " + wording.needle(k, v)) for k, v in pairs]
        asked = rng.sample(pairs, count)
        keys = [k for k, _ in asked]
        question = self.encode(self._question(wording.question(keys), wording.answer_prefix(keys)))
        answer = self._answer(", ".join(f"{k} is {v}" for k, v in asked))
        return self._place(length, self._intro(length, wording.intro), needles, [(question, answer)])

    def chain(self, length: int) -> tuple[list[int], list[int]]:
        """A value copied from variable to variable; the names are asked for in order."""
        rng, taken = self.rng, set[str]()
        own = rng.random() < 0.3
        intro: list[int] = []
        needles, questions = [], []
        for chain in range(1 if length < 256 else rng.choice((1, 1, 2))):
            hops = rng.randint(*self.stage.hops)
            value = words.number(rng, "train", taken, 5)
            names = [words.variable(rng, "train", taken) for _ in range(hops + 1)]
            if own:
                links = [CHAIN_LINK.format(source=a, target=b) for a, b in zip([value, *names], names, strict=False)]
                question = CHAIN_QUESTION.format(source=value)
            else:
                links = ruler_text.chain_statements(value, names)
                question = self._question(
                    ruler_text.chain_question(value), ruler_text.chain_prefix(value, len(names))
                )
                if chain == 0:
                    intro = self._intro(length, ruler_text.CHAIN_INTRO)
                    if intro and length >= 384 and rng.random() < 0.7:
                        intro = intro + self.encode(self._chain_example(hops))
            needles.append([self.encode(" " + link) for link in links])
            questions.append((self.encode(question), self._answer(" ".join(names))))
        return self._place(length, intro, self._merged(needles), questions)

    def _chain_example(self, hops: int) -> str:
        names = [words.variable(self.rng, "train", letters=3) for _ in range(hops + 1)]
        return ruler_text.chain_example(names)

    def _facts(self, length, count):
        """Wording, (key, value) pairs and intro of facts with distinct keys."""
        rng, digits = self.rng, self._digits()
        long = length >= 256
        kinds = rng.choices(("wn", "wu", "ww", "uu"), (6, 2.5 * long, 1, 1.5 * long))[0]
        key_kind, value_kind = ("uuids" if kinds[0] == "u" else "words"), {"n": "numbers", "u": "uuids", "w": "words"}[kinds[1]]
        taken: set[str] = set()

        def value() -> str:
            if value_kind == "numbers":
                return words.number(rng, "train", taken, digits)
            return words.value(value_kind, rng, "train", taken)

        pairs = [(words.value(key_kind, rng, "train", taken), value()) for _ in range(count)]
        wording = ruler_text.NeedleWording(value_kind)
        fact = rng.choice(FACTS) if rng.random() < 0.4 else None

        def say(key: str, value: str) -> list[int]:
            return self.encode(" " + (fact.sentence.format(key=key, value=value) if fact else wording.needle(key, value)))

        def ask(key: str, value: str) -> tuple[list[int], list[int]]:
            if fact:
                return self.encode(fact.question.format(key=key)), self._answer(value)
            question = self._question(wording.question([key]), wording.answer_prefix([key]))
            return self.encode(question), self._answer(value)

        return say, ask, pairs, [] if fact else self._intro(length, wording.intro)

    def _place(self, length, intro, needles, questions) -> tuple[list[int], list[int]]:
        """Needles among text so that everything fills `length`; questions that do not fit are left out.

        Needles that leave no room for the first question make it a row of text.
        """
        room = length - len(intro) - sum(map(len, needles))
        if not questions or room < len(questions[0][0]) + len(questions[0][1]):
            return self.text(length)
        asked = Asked()
        for question, answer in questions:
            if len(asked.ids) + len(question) + len(answer) <= room:
                asked.add(question, answer)
        hay = self._hay(room - len(asked.ids))
        cuts = sorted(self._cut(hay) for _ in needles)
        context, done = list(intro), 0
        for cut, needle in zip(cuts, needles, strict=True):
            context += hay[done:cut] + needle
            done = cut
        context += hay[done:]
        return context + asked.ids, [IGNORE] * len(context) + asked.labels

    def _merged(self, groups: list[list[list[int]]]) -> list[list[int]]:
        """The needles of all groups in one random order that keeps the order within each group."""
        turns = [turn for group in groups for turn in [iter(group)] * len(group)]
        self.rng.shuffle(turns)
        return [next(turn) for turn in turns]

    def _hay(self, length: int) -> list[int]:
        if self.rng.random() < 0.2:
            noise = self.encode(" " + NOISE)
            at = self.rng.randrange(len(noise))
            return (noise[at:] + noise * (length // len(noise) + 1))[:length]
        return self._passage(length)

    def _cut(self, hay: list[int]) -> int:
        return self._word_start(hay, 0, len(hay)) if len(hay) > 4 else 0

    def _word_start(self, ids: list[int], low: int, high: int) -> int:
        """A random position in [low, high) at which a word starts, the first one tried if none is found soon."""
        first = at = self.rng.randrange(low, max(low + 1, high))
        for _ in range(16):
            if at < len(ids) and self.starts_word[ids[at]]:
                return at
            at = at + 1 if at + 1 < high else low
        return first

    def _passage(self, length: int) -> list[int]:
        at = self.rng.randrange(len(self.pool) - length)
        return self.pool[at : at + length].tolist()

    def _digits(self) -> int:
        return self.rng.randint(*self.stage.digits)

    def _question(self, question: str, prefix: str) -> str:
        return "\n" + prefix[1:] if self.rng.random() < self.stage.brief else question + prefix

    def _intro(self, length: int, intro: str) -> list[int]:
        return self.encode(intro) if length >= 160 and self.rng.random() < 0.7 else []

    def _answer(self, text: str) -> list[int]:
        return [*self.encode(f" {text}."), self.eos]


@lru_cache(maxsize=1)
def _encoder(tokenizer: PreTrainedTokenizerFast):
    backend = tokenizer.backend_tokenizer
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@lru_cache(maxsize=1)
def _starts_word(tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    return [token.startswith("Ġ") for token in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
