"""Needles at given depths of essays of given lengths: the grid of a needle heat map (Kamradt 2023)."""

import random
from dataclasses import replace
from typing import Any, ClassVar

from learnkv.data.fitting import filled
from learnkv.data.ruler_needles import Needles
from learnkv.data.sample import Sample
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.ruler import essay_name, template_tokens
from learnkv.evaluation.tasks.suite import Suite, limit

NEW_TOKENS = 32
"""Of the answer, for every needle."""


class NeedleGrid(Suite):
    """`samples=` prompts for every length and depth, of one needle and of `suite.needles`, all of which are asked for.

    The prompts of one number differ between depths in nothing but the needles' place. The first of several needles lies
    at the depth, the others evenly between it and the end.
    """

    name = "needle_grid"
    tasks: ClassVar[tuple[str, ...]] = ("needle_grid_single", "needle_grid_multi")
    essays = True
    cut = False

    def haystack(self, config: EvalConfig) -> str | None:
        return essay_name(config.haystack)

    def samples(self, config: EvalConfig, task: str, length: int, tokenizer: Any) -> list[tuple[int, Sample]]:
        places = list(enumerate(config.suite.depths))
        return [
            (number * len(places) + place, _sample(config, task, length, tokenizer, number, depth))
            for number in range(config.samples)
            for place, depth in places
        ]


def _sample(config: EvalConfig, task: str, length: int, tokenizer: Any, number: int, depth: float) -> Sample:
    count = 1 if task == "needle_grid_single" else config.suite.needles
    depths = tuple(depth + (100 - depth) * needle / count for needle in range(count))
    kind = "words" if config.keys == "english" else config.keys
    needles = Needles(key_kind=kind, keys=count, queries=count, template=config.template, depths=depths)
    draft = needles(random.Random(f"{config.seed}:{task}:{number}"), "eval", config.haystack)
    tokens = limit(config, NEW_TOKENS * count)
    chosen = filled(task, draft, tokenizer, length - template_tokens(tokenizer), tokens)
    return replace(Sample(**vars(chosen), task=task, max_new_tokens=tokens), depth=depth)
