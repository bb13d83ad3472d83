"""RULER's needles in a haystack: keys and values among noise, essays or other needles."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, islice
from typing import Literal

from learnkv.data.haystack import NOISE, essay, sentences
from learnkv.data.ruler_text import MemoWording, NeedleWording, listed
from learnkv.data.sample import Draft
from learnkv.data.words import Split, value

Template = Literal["secret", "memo"]
TEMPLATES: dict[Template, type[NeedleWording]] = {"secret": NeedleWording, "memo": MemoWording}

DEPTHS = [round(100 * i / 39) for i in range(40)]


@dataclass(frozen=True)
class Needles:
    """A needle task: `keys` keys with `values` values each; the question is about `queries` of the keys.

    A call samples all random parts and returns drafts with any number of haystack units: words of an essay, sentences
    of noise, or distractor needles.
    """

    haystack: Literal["noise", "essay", "needle"] = "essay"
    key_kind: str = "words"
    value_kind: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1
    template: Template = "secret"
    depths: tuple[float, ...] | None = None
    """Where the needles are, in percent of the haystack; None: sampled."""

    def __call__(self, rng: random.Random, split: Split, essay_file: str | None) -> Callable[[int], Draft]:
        taken: set[str] = set()
        keys = [value(self.key_kind, rng, split, taken) for _ in range(max(self.keys, self.queries))]
        noted = {key: [value(self.value_kind, rng, split, taken) for _ in range(self.values)] for key in keys}
        queried = rng.sample(keys, self.queries)
        answers = [answer for key in queried for answer in noted[key]]
        wording = TEMPLATES[self.template](self.value_kind, many=len(answers) > 1)
        needles = [wording.needle(key, noted_value) for key, values in noted.items() for noted_value in values]
        asked = wording.needle(queried[0], answers[0])
        rng.shuffle(needles)
        depths = sorted(rng.sample(DEPTHS, len(needles)) if self.depths is None else self.depths)
        hay = self._haystack(random.Random(rng.getrandbits(64)), wording, split, taken, essay_file)

        def draft(units: int) -> Draft:
            parts = hay(units)
            places = [self._place(parts, depth) for depth in depths]
            return Draft(
                wording.intro + " ".join(hide(parts, needles, places)),
                wording.question(queried),
                wording.answer_prefix(queried),
                answers,
                wording=listed(answers),
                depth=depths[needles.index(asked)],
            )

        return draft

    def _place(self, parts: list[str], depth: float) -> int:
        """Index before which a needle goes: by sentences, or where depths are given by words."""
        if self.depths is None:
            return round(len(parts) * depth / 100)
        return place_of(parts, depth)

    def _haystack(
        self, rng: random.Random, wording: NeedleWording, split: Split, taken: set[str], essay_file: str | None
    ) -> Callable[[int], list[str]]:
        if self.haystack == "noise":
            return noise
        if self.haystack == "essay":
            return essay_words(rng, essay_file)
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


def essay_words(rng: random.Random, file: str | None) -> Callable[[int], list[str]]:
    """Sentences of the essays from a sampled one on, up to a number of words in total, the last one truncated."""
    text = essay(file)
    begin = rng.randrange(len(text))
    return lambda units: _first_words(islice(cycle(text), begin, None), units)


def hide(parts: list[str], needles: Sequence[str], places: Sequence[int]) -> list[str]:
    """The parts with every needle before the part at its place; places ascend."""
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        parts.insert(place, needle)
    return parts


def place_of(parts: Sequence[str], depth: float) -> int:
    """The place between sentences that is nearest to `depth` percent of their words."""
    ends = list(accumulate((len(part.split(" ")) for part in parts), initial=0))
    return min(range(len(ends)), key=lambda place: abs(ends[place] - ends[-1] * depth / 100))


def _first_words(text: Iterator[str], count: int) -> list[str]:
    """Sentences of `text` up to `count` words in total, the last one truncated."""
    taken: list[str] = []
    while count > 0:
        words = next(text).split(" ")[:count]
        taken.append(" ".join(words))
        count -= len(words)
    return taken
