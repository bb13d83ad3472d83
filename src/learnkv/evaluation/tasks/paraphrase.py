"""Needles that have no word in common with their question: by meaning, or by what is known of the world.

The idea is that of NoLiMa (Modarressi et al. 2025, arXiv 2502.05167); needles and questions are our own.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from learnkv.data.fitting import filled
from learnkv.data.ruler_needles import DEPTHS, essay_words, hide, place_of
from learnkv.data.sample import Draft
from learnkv.evaluation.config import EvalConfig, Metric
from learnkv.evaluation.tasks.answers import Answers
from learnkv.evaluation.tasks.choices import Choices, ChoiceSample
from learnkv.evaluation.tasks.suite import MadeSuite, generator, limit

NEW_TOKENS = 24
PEOPLE = 4
"""Of whom a needle each is hidden; the question is about one of them."""
INTRO = "The pages below mention several people. A question about them follows, and its answer is one name.\n"
NAMES = (
    *("Agnes", "Bruno", "Clara", "Diego", "Edith", "Felix", "Greta", "Hugo", "Ingrid", "Jonas", "Katrin", "Lucas"),
    *("Mabel", "Nadia", "Oscar", "Petra", "Quentin", "Rosa", "Silas", "Thea", "Ursula", "Viktor", "Wanda", "Yusuf"),
)
FACTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "paraphrase_meaning": (
        ("{name} mends shoes all day.", "Which person works as a cobbler?"),
        ("{name} bakes loaves before dawn.", "Who makes bread?"),
        ("{name} cannot see anything since birth.", "Which of the people is blind?"),
        ("{name} owns three hundred sheep.", "Which person keeps a large flock?"),
        ("{name} is afraid of spiders.", "Who has arachnophobia?"),
        ("{name} never tells the truth.", "Which person is a liar?"),
        ("{name} earns a living by pulling teeth.", "Who practises dentistry?"),
        ("{name} went to sea as a boy and stayed there.", "Which person became some kind of sailor?"),
        ("{name} has no hair left.", "Who is bald?"),
        ("{name} gave away every coin and owns nothing.", "Which person is penniless?"),
        ("{name} eats neither meat nor fish.", "Who is a vegetarian?"),
        ("{name} buried a wife last spring.", "Which person became widowed?"),
    ),
    "paraphrase_knowledge": (
        ("{name} sees the Eiffel Tower from the kitchen.", "Which person lives in Paris?"),
        ("{name} swam in the Thames as a child.", "Who has been to England?"),
        ("{name} photographed the pyramids at Giza.", "Which person visited Egypt?"),
        ("{name} rents a flat beside the Colosseum.", "Who lives in Italy?"),
        ("{name} climbed Mount Fuji twice.", "Which person has been to Japan?"),
        ("{name} prayed at the Taj Mahal.", "Who travelled through India?"),
        ("{name} worked a summer on the Golden Gate Bridge.", "Which person knows California?"),
        ("{name} was married next to the Brandenburg Gate.", "Who has been in Berlin?"),
        ("{name} sang at the opera house on Sydney harbour.", "Which person performed in Australia?"),
        ("{name} skated on the Neva in front of the Hermitage.", "Who knows Russia?"),
        ("{name} guarded the Acropolis at night.", "Which person had a job in Greece?"),
        ("{name} sold fruit below the Christ statue of Rio.", "Who worked somewhere in Brazil?"),
    ),
}


@dataclass(frozen=True)
class NameSample(ChoiceSample):
    """A question whose answer is one of the names in the text: the first one that the output has."""

    def score(self, prediction: str) -> float:
        places = {name: prediction.find(name) for name in self.choices if name in prediction}
        return float(bool(places) and min(places, key=lambda name: places[name]) == self.answers[0])

    def complete(self, prediction: str) -> bool:
        return any(name in prediction for name in self.choices)


class Paraphrase(MadeSuite):
    """One fact about each of four people in essays; the question puts one of them into other words."""

    name = "paraphrase"
    tasks: ClassVar[tuple[str, ...]] = tuple(FACTS)
    families: ClassVar[Mapping[Metric, type[Answers]]] = {"generated": Answers, "forced": Choices}
    essays = True

    def sample(self, config: EvalConfig, task: str, length: int, tokenizer: Any, number: int) -> NameSample:
        rng, tokens = generator(config, task, number), limit(config, NEW_TOKENS)
        names, facts = rng.sample(NAMES, PEOPLE), rng.sample(FACTS[task], PEOPLE)
        chosen = filled(task, _draft(rng, names, facts, config.haystack), tokenizer, length, tokens)
        return NameSample(**vars(chosen), task=task, max_new_tokens=tokens, choices=tuple(sorted(names)))


def _draft(
    rng: random.Random, names: Sequence[str], facts: Sequence[tuple[str, str]], haystack: str | None
) -> Callable[[int], Draft]:
    """Prompts with any number of words of essays; the question is about the first person."""
    depths = rng.sample(DEPTHS, PEOPLE)
    needles = [fact.format(name=name) for name, (fact, _) in zip(names, facts, strict=True)]
    order = sorted(range(PEOPLE), key=lambda person: depths[person])
    hay = essay_words(random.Random(rng.getrandbits(64)), haystack)

    def draft(units: int) -> Draft:
        parts = hay(units)
        places = [place_of(parts, depths[person]) for person in order]
        text = " ".join(hide(parts, [needles[person] for person in order], places))
        return Draft(INTRO + text, f"\n{facts[0][1]}", "\nName:", [names[0]], depth=depths[0])

    return draft
