"""RULER's tasks over lists: variable chains, the most common words, the most frequent code words."""

import math
import random
import string
from collections.abc import Callable

from learnkv.data import ruler_text as text
from learnkv.data.ruler_needles import noise
from learnkv.data.sample import Draft
from learnkv.data.words import Split, draw, key_word, number, variable, word_list

COMMON = 10
"""Number of common words in the answer."""
SHORT = 4096
"""Below this length in tokens, words are repeated less often (and the example is smaller)."""


def chain(rng: random.Random, split: Split, hops: int = 4) -> Callable[[int], Draft]:
    """Variable tracking: a value copied along `hops` + 1 variables among sentences of noise, which are the units."""
    taken: set[str] = set()
    example = text.chain_example([variable(rng, split, taken, letters=3) for _ in range(hops + 1)])
    start = number(rng, split, taken, digits=5)
    names = [variable(rng, split, taken) for _ in range(hops + 1)]
    depths = sorted(rng.random() for _ in names)
    links = text.chain_statements(start, names)

    def draft(units: int) -> Draft:
        parts = noise(units)
        for depth, link in zip(reversed(depths), reversed(links), strict=True):
            parts.insert(int(depth * (units + 1)), link)
        return Draft(
            text.CHAIN_INTRO + example + " ".join(parts),
            text.chain_question(start),
            text.chain_prefix(start, len(names)),
            names,
            wording=" ".join(names),
        )

    return draft


def common_words(rng: random.Random, split: Split, length: int) -> Callable[[int], Draft]:
    """Common words extraction: 10 words occur often, the others (the units) rarely, after a solved example.

    A common word occurs 30 times and another one 3 times; 6 times and once in prompts under 4,096 tokens.
    """
    short = length < SHORT
    often, seldom = (6, 1) if short else (30, 3)
    words = sorted({w for kind in ("noun", "adjective", "verb") for w in word_list(kind, split)})
    rng.shuffle(words)
    more = random.Random(rng.getrandbits(64))
    order = rng.getrandbits(64)

    def numbered(common: list[str], others: list[str], often: int, seldom: int) -> str:
        items = common * often + others * seldom
        random.Random(order).shuffle(items)
        return text.numbered(items)

    def take(count: int) -> list[str]:
        return [words.pop() for _ in range(count)]

    shown, common = take(COMMON), take(COMMON)
    listing = numbered(shown, take(10 if short else 30), *((3, 1) if short else (10, 3)))
    solved = f"{text.COMMON_QUESTION}{text.COMMON_PREFIX} {text.numbered(shown)}"
    example = f"An example: {listing}{solved}\nNow the list.\n"
    others, taken = list(words), set(words)

    def draft(units: int) -> Draft:
        while len(others) < units:
            others.append(key_word(more, split, taken))
        context = text.COMMON_INTRO + example + numbered(common, others[:units], often, seldom)
        solution = text.numbered(common)
        return Draft(context, text.COMMON_QUESTION, text.COMMON_PREFIX, common, wording=solution)

    return draft


def coded_words(rng: random.Random, split: Split, length: int, alpha: float = 2.0) -> Callable[[int], Draft]:
    """Frequent words extraction: code words of six letters with Zeta(alpha) frequencies; the units are words.

    The most frequent word is a row of dots; the next three are the answer.
    """
    taken: set[str] = set()
    count = max(5, length // 50)
    vocabulary = ["..."] + [
        draw(lambda: "".join(rng.choices(string.ascii_lowercase, k=6)), split, taken) for _ in range(count - 1)
    ]
    zeta = math.fsum(k**-alpha for k in range(1, 100_000))
    order = rng.getrandbits(64)

    def draft(units: int) -> Draft:
        words = [w for k, w in enumerate(vocabulary, 1) for _ in range(int(units * k**-alpha / zeta))]
        random.Random(order).shuffle(words)
        return Draft(text.CODED_INTRO + " ".join(words), text.CODED_QUESTION, text.CODED_PREFIX, vocabulary[1:4])

    return draft
