"""Random numbers as functions of a seed and a key, so that resuming or adding processes changes nothing."""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def generator(seed: int, *key: str | int) -> random.Random:
    """An independent generator for every `key`, such as ("keep", global step) or ("sample", index)."""
    text = "/".join(map(str, (seed, *key)))
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """A log-uniform number between `low` and `high`."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def stratified(rng: random.Random, low: float, high: float, count: int) -> list[float]:
    """`count` log-uniform numbers, one in each of `count` equal parts of the range, for less variance."""
    width = math.log(high / low) / count
    return [low * math.exp((part + rng.random()) * width) for part in range(count)]


def weighted_choice(rng: random.Random, weights: Sequence[tuple[float, T]]) -> T:
    """One of the values, with probabilities in proportion to the weights."""
    return rng.choices([value for _, value in weights], [weight for weight, _ in weights])[0]
