"""Random draws as functions of a seed and a place, so that resuming or more processes change nothing."""

import hashlib
import math
import random
from collections.abc import Sequence
from typing import Literal, TypeVar

T = TypeVar("T")
Draw = Literal["spread", "sandwich"]


def generator(seed: int, *place: str | int) -> random.Random:
    """A generator of its own for every `place`, such as ("keep", global step) or ("sample", index)."""
    text = "/".join(map(str, (seed, *place)))
    return random.Random(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big"))


def log_uniform(rng: random.Random, low: float, high: float) -> float:
    """A number between `low` and `high`, uniform in its logarithm."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def spread(rng: random.Random, low: float, high: float, count: int) -> list[float]:
    """`count` log-uniform numbers, one in each of `count` equal parts of the range: less noise than free draws."""
    width = math.log(high / low) / count
    return [low * math.exp((part + rng.random()) * width) for part in range(count)]


def pick(rng: random.Random, weights: Sequence[tuple[float, T]]) -> T:
    """One of the values, by weight."""
    return rng.choices([value for _, value in weights], [weight for weight, _ in weights])[0]
