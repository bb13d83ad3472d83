"""Several replies to equal requests in a long conversation, one of which is to be repeated.

The form is that of MRCR (Vodrahalli et al. 2024, arXiv 2409.12640); requests and replies are our own.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, ClassVar

from learnkv.data.fitting import filled
from learnkv.data.sample import Draft
from learnkv.data.words import number as random_number
from learnkv.data.words import word_list
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.suite import MadeSuite, SuiteSample, generator, limit

NEW_TOKENS = 96
FORMS = ("note", "verse", "riddle", "letter", "speech", "recipe", "rumour", "prayer")
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
INTRO = "Below is a conversation. Some of its requests occur again, each time with another reply.\n\n"


@dataclass(frozen=True)
class ReplySample(SuiteSample):
    """A reply that is to be repeated behind a code, which is the answer prefix; the first line of the output counts."""

    def score(self, prediction: str) -> float:
        """Similarity to the reply, difflib's ratio."""
        line = prediction.strip().split("\n")[0].strip()
        return SequenceMatcher(None, line, self.answers[0], autojunk=False).ratio()

    def complete(self, prediction: str) -> bool:
        return "\n" in prediction.lstrip()


class Coreference(MadeSuite):
    """Conversations with two, four or eight equal requests."""

    name = "mrcr"
    tasks: ClassVar[tuple[str, ...]] = ("mrcr_2", "mrcr_4", "mrcr_8")

    def sample(self, config: EvalConfig, task: str, length: int, tokenizer: Any, number: int) -> ReplySample:
        rng, tokens = generator(config, task, number), limit(config, NEW_TOKENS)
        chosen = filled(task, _draft(rng, int(task.removeprefix("mrcr_"))), tokenizer, length, tokens)
        return ReplySample(**vars(chosen), task=task, max_new_tokens=tokens)


def _draft(rng: random.Random, count: int) -> Callable[[int], Draft]:
    """Conversations with any number of other requests."""
    code, form, topic = random_number(rng, "eval"), rng.choice(FORMS), rng.choice(word_list("noun", "eval"))
    replies = [_reply(rng) for _ in range(count)]
    asked = rng.randrange(count)
    depths = sorted(rng.random() for _ in range(count))
    others_rng, others = random.Random(rng.getrandbits(64)), list[str]()

    def draft(units: int) -> Draft:
        while len(others) < units:
            other = others_rng.choice(FORMS), others_rng.choice(word_list("noun", "eval"))
            if other != (form, topic):
                others.append(_turn(*other, _reply(others_rng)))
        turns = others[:units]
        for depth, reply in zip(reversed(depths), reversed(replies), strict=True):
            turns.insert(round(units * depth), _turn(form, topic, reply))
        which = f"the {ORDINALS[asked]} reply to the request for a {form} about {topic}"
        question = f"\n\nRepeat {which}, word for word, in one line that begins with {code}.\n"
        return Draft(INTRO + "\n".join(turns), question, code, [replies[asked]], depth=100 * depths[asked])

    return draft


def _turn(form: str, topic: str, reply: str) -> str:
    return f"User: Write a {form} about {topic}.\nAssistant: {reply}"


def _reply(rng: random.Random) -> str:
    """Two sentences of sampled words."""
    kinds = [word_list(kind, "eval") for kind in ("adjective", "noun", "verb", "adjective", "noun")]
    words = [[rng.choice(kind) for kind in kinds] for _ in range(2)]
    return " ".join(f"The {a} {b} may {c} the {d} {e}." for a, b, c, d, e in words)
