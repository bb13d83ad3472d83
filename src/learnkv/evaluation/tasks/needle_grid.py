"""Needles at given depths of essays of given lengths: the grid of a needle heat map (Kamradt 2023)."""

from dataclasses import replace
from typing import Any, ClassVar

from learnkv.data.fitting import filled
from learnkv.data.ruler_needles import Needles
from learnkv.data.sample import Sample
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.suite import MadeSuite, generator, limit

NEW_TOKENS = 32
"""Of the answer, for every needle."""


class GridSample(Sample):
    """A prompt with its depth; in a short prompt two depths may be one place, and each is measured."""

    @property
    def scoring(self) -> tuple[Any, ...]:
        return (*super().scoring, self.depth)


class NeedleGrid(MadeSuite):
    """`samples=` prompts for every length and depth, of one needle and of `suite.needles`, all of which are asked for.

    The prompts of one number differ between depths in nothing but the needles' place. The first of several needles lies
    at the depth, the others evenly between it and the end.
    """

    name = "needle_grid"
    tasks: ClassVar[tuple[str, ...]] = ("needle_grid_single", "needle_grid_multi")
    essays = True

    def variants(self, config: EvalConfig) -> int:
        return len(config.suite.depths)

    def sample(self, config: EvalConfig, task: str, length: int, tokenizer: Any, number: int) -> Sample:
        number, place = divmod(number, len(config.suite.depths))
        depth = config.suite.depths[place]
        count = 1 if task == "needle_grid_single" else config.suite.needles
        depths = tuple(depth + (100 - depth) * needle / count for needle in range(count))
        kind = "words" if config.keys == "english" else config.keys
        needles = Needles(key_kind=kind, keys=count, queries=count, template=config.template, depths=depths)
        draft = needles(generator(config, task, number), "eval", config.haystack)
        tokens = limit(config, NEW_TOKENS * count)
        chosen = filled(task, draft, tokenizer, length, tokens)
        return replace(GridSample(**vars(chosen), task=task, max_new_tokens=tokens), depth=depth)
