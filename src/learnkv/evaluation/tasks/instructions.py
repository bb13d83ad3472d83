"""Whether the rules of a system message are still followed after compression (as arXiv 2510.00231 asks).

Code checks the rules, as in IFEval (Zhou et al. 2023, arXiv 2311.07911); the rules are our own.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from learnkv.data.fitting import filled
from learnkv.data.ruler_needles import essay_words
from learnkv.data.sample import Draft
from learnkv.data.words import word_list
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.suite import MadeSuite, SuiteSample, generator, limit

NEW_TOKENS = 64
QUESTIONS = (
    "\nIn one short sentence: what are these pages about?",
    "\nWrite one short sentence that goes on where the pages end.",
    "\nIn one short sentence: name a thing that occurs in these pages.",
)


class Rule(NamedTuple):
    """A rule for replies about a word: its text with `{word}`, its check, and what makes a reply follow it."""

    text: str
    check: Callable[[str, str], bool]
    """Of a stripped reply and the word."""
    apply: Callable[[str, str], str]


SHAPES = {
    "begin": Rule(
        'Begin with the word "{word}".',
        lambda reply, word: 0 in _places(_inside(reply), word),
        lambda reply, word: f"{word.capitalize()}: {reply}",
    ),
    "twice": Rule(
        'Use the word "{word}" at least twice.',
        lambda reply, word: len(_places(reply, word)) >= 2,
        lambda reply, word: f"{reply.rstrip('.')} with {word} and {word}.",
    ),
    "bracket": Rule(
        'Use the word "{word}" in square brackets.',
        lambda reply, word: f"[{word}]" in reply.lower(),
        lambda reply, word: f"{reply.rstrip('.')} [{word}].",
    ),
    "end": Rule(
        'Let the last word be "{word}".',
        lambda reply, word: len(end := _inside(reply).rstrip(".!?")) - len(word) in _places(end, word),
        lambda reply, word: f"{reply.rstrip('.')}, {word}.",
    ),
}
CASES = {
    "capitals": Rule("Write in capital letters only.", lambda reply, _: reply.isupper(), lambda r, _: r.upper()),
    "small": Rule("Write in small letters only.", lambda reply, _: reply.islower(), lambda r, _: r.lower()),
}
QUOTES = {
    "quotes": Rule(
        "Put the whole reply in double quotes.",
        lambda reply, _: len(reply) > 2 and reply[0] in '"“' and reply[-1] in '"”',
        lambda reply, _: f'"{reply}"',
    )
}
RULES = {**SHAPES, **CASES, **QUOTES}
"""In the order in which a reply is changed to follow them."""


@dataclass(frozen=True)
class RuleSample(SuiteSample):
    """A reply that is to follow rules, whatever it says: the share of them that it follows.

    Args:
        rules: names of rules, and the words that they are about.
    """

    rules: tuple[tuple[str, str], ...] = ()

    def score(self, prediction: str) -> float:
        reply = prediction.strip()
        followed = [bool(reply) and RULES[name].check(reply, word) for name, word in self.rules]
        return sum(followed) / len(followed)


class Instructions(MadeSuite):
    """A system message with two or three rules, essays, and a request that does not repeat the rules."""

    name = "instructions"
    tasks: ClassVar[tuple[str, ...]] = ("instructions_2", "instructions_3")
    essays = True

    def sample(self, config: EvalConfig, task: str, length: int, tokenizer: Any, number: int) -> RuleSample:
        rng, tokens = generator(config, task, number), limit(config, NEW_TOKENS)
        rules = sampled_rules(rng, int(task.removeprefix("instructions_")))
        texts = (f"({place}) {RULES[name].text.format(word=word)}" for place, (name, word) in enumerate(rules, 1))
        system = f"Every reply of yours follows these rules: {' '.join(texts)}"
        hay, question = essay_words(rng, config.haystack), rng.choice(QUESTIONS)

        def draft(units: int) -> Draft:
            pages = f"Pages:\n{' '.join(hay(units))}\n"
            return Draft(f"{system}\n\n{pages}", question, "", [obedient(rules)])

        chosen = filled(task, draft, tokenizer, length - ROLE_TOKENS, tokens)
        made = RuleSample(**vars(chosen), task=task, max_new_tokens=tokens, rules=rules)
        return replace(made, context=made.context.removeprefix(f"{system}\n\n"), system=system)


ROLE_TOKENS = 16
"""Room for what a chat template puts around a system message."""


def sampled_rules(rng: random.Random, count: int) -> tuple[tuple[str, str], ...]:
    """Rules that one reply can follow: at most one about its letters, each about another word."""
    names = rng.sample([*SHAPES, rng.choice([*CASES]), *QUOTES], count)
    words = dict(zip(names, rng.sample(word_list("noun", "eval"), count), strict=True))
    return tuple((name, words[name]) for name in RULES if name in words)


def obedient(rules: tuple[tuple[str, str], ...]) -> str:
    """A reply that follows all of the rules, which are in the order of `RULES`."""
    reply = "These pages are about many things."
    for name, word in rules:
        reply = RULES[name].apply(reply, word)
    return reply


def _places(reply: str, word: str) -> list[int]:
    """Where a reply has the word, in capital or small letters, as a whole."""
    return [match.start() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", reply, re.IGNORECASE)]


def _inside(reply: str) -> str:
    """A reply without quotes around it."""
    return reply.strip('"“” ')
