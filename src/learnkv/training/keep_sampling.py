"""Kept fractions of a batch's students."""

import random

from learnkv.training import seeding
from learnkv.training.settings import DistillationSettings


def sample_keeps(settings: DistillationSettings, rng: random.Random) -> list[float]:
    """One kept fraction per student, by `settings.keep_sampling`; a list of fractions is sampled uniformly."""
    listed, (low, high) = settings.keep, settings.keep_bounds
    if settings.keep_sampling == "sandwich":
        count = settings.students - 2
        return [
            low,
            *(rng.choice(listed) if listed else seeding.log_uniform(rng, low, high) for _ in range(count)),
            high,
        ]
    if listed:
        return [rng.choice(listed) for _ in range(settings.students)]
    return seeding.stratified(rng, low, high, settings.students)
