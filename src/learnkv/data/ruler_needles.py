"""RULER's needles in a haystack: keys and values noted among noise, essays or other needles."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Literal

from learnkv.data.haystack import NOISE, essay, sentences
from learnkv.data.ruler_text import MemoWording, NeedleWording
from learnkv.data.sample import Draft
from learnkv.data.words import Split, value

Template = Literal["secret", "memo"]
TEMPLATES: dict[Template, type[NeedleWording]] = {"secret": NeedleWording, "memo": MemoWording}

DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True)
class Needles:
    """A needle task: `keys` keys with `values` values each, of which `queries` keys are asked for.

    Calling it draws everything random and returns the draft of any number of haystack units: words of an essay,
    sentences of noise, or needles with keys that nobody asks for.
    """

    haystack: Literal["noise", "essay", "needle"] = "essay"
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    template: Template = "secret"

    def __call__(self, rng: random.Random, split: Split, essay_file: str | None) -> Callable[[int], Draft]:
        taken: set[str] = set()
        keys = [value(self.key_kind, rng, split, taken) for _ in range(max(self.keys, self.queries))]
        noted = {key: [value(self.value_kind, rng, split, taken) for _ in range(self.values)] for key in keys}
        asked = rng.sample(keys, self.queries)
        answers = [answer for key in asked for answer in noted[key]]
        wording = TEMPLATES[self.template](self.value_kind, many=len(answers) > 1)
        needles = [wording.needle(key, noted_value) for key, values in noted.items() for noted_value in values]
        rng.shuffle(needles)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        hay = self._haystack(random.Random(rng.getrandbits(64)), wording, split, taken, essay_file)

        def draft(units: int) -> Draft:
            told = hay(units)
            size = len(told)
            for depth, needle in zip(reversed(depths), reversed(needles), strict=True):
                told.insert(round(size * depth / 100), needle)
            return Draft(wording.intro + " ".join(told), wording.question(asked), wording.answer_prefix(asked), answers)

        return draft

    def _haystack(
        self, rng: random.Random, wording: NeedleWording, split: Split, taken: set[str], essay_file: str | None
    ) -> Callable[[int], list[str]]:
        if self.haystack == "noise":
            return noise
        if self.haystack == "essay":
            text = essay(essay_file)
            start = rng.randrange(len(text))
            return lambda units: _first_words(islice(cycle(text), start, None), units)
        others: list[str] = []

        def distractors(units: int) -> list[str]:
            while len(others) < units:
                key, other = (value(kind, rng, split, taken) for kind in (self.key_kind, self.value_kind))
                others.append(wording.needle(key, other))
            return others[:units]

        return distractors


def noise(units: int) -> list[str]:
    """The first `units` sentences of endless noise."""
    return list(islice(cycle(sentences(NOISE)), units))


def _first_words(text: Iterator[str], count: int) -> list[str]:
    """Sentences of `text` up to `count` words in all, the last one cut short."""
    told: list[str] = []
    while count > 0:
        words = next(text).split(" ")[:count]
        told.append(" ".join(words))
        count -= len(words)
    return told
