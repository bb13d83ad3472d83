"""Every scorer and every allocator of the package, built for a model of any shape."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import learnkv.allocators
import learnkv.scorers
from learnkv.allocators import Allocator, LearnedAllocator, LearnedSequentialAllocator, Pyramid
from learnkv.core.component import Component
from learnkv.scorers import GateScorer, HiddenScorer, LearnedScorer, Scorer, SnapKV, TrimKV
from support.observations import randomised, subclasses
from support.tables import made_up

SCORERS = subclasses(learnkv.scorers, Scorer)
AnyComponent = TypeVar("AnyComponent", bound=Component)
ALLOCATORS = subclasses(learnkv.allocators, Allocator)

LEARNED: dict[type, Callable[[int, int, int, int, int], Any]] = {
    LearnedScorer: lambda layers, heads, group, dim, hidden: LearnedScorer(
        SnapKV(window=8), layers, heads, dim, rank=3, hidden_size=hidden
    ),
    HiddenScorer: lambda layers, heads, group, dim, hidden: HiddenScorer(
        SnapKV(window=8), layers, heads, dim, hidden, reads=["hidden", "keys", "values"]
    ),
    GateScorer: lambda layers, heads, group, dim, hidden: GateScorer(
        SnapKV(window=8), layers, heads, hidden, num_groups=group
    ),
    TrimKV: lambda layers, heads, group, dim, hidden: TrimKV(
        num_layers=layers, num_heads=heads, hidden_size=hidden, width=5
    ),
    LearnedAllocator: lambda layers, heads, group, dim, hidden: LearnedAllocator(
        Pyramid(), layers, heads, conditioned=True, window=8
    ),
    LearnedSequentialAllocator: lambda layers, heads, group, dim, hidden: LearnedSequentialAllocator(
        Pyramid(), layers, heads, window=8
    ),
}

KNOWS_ITS_HEAD = {
    learnkv.scorers.Random,
    LearnedScorer,
    HiddenScorer,
    GateScorer,
    TrimKV,
    learnkv.scorers.CompressKV,
    learnkv.scorers.VaSE,
    learnkv.scorers.FastKVzip,
    learnkv.scorers.IndexMem,
    LearnedAllocator,
    LearnedSequentialAllocator,
    learnkv.allocators.HeadKV,
    learnkv.allocators.LUKV,
    learnkv.allocators.DuoAttention,
    learnkv.allocators.HeteroCache,
}
"""Those of which a head's number is an input."""


def build(cls: type[AnyComponent], layers: int, heads: int, group: int, dim: int, hidden: int = 32) -> AnyComponent:
    """A component with its defaults: learned parameters at random, tables made up, scores of SnapKV to correct."""
    if cls in LEARNED:
        learned: AnyComponent = randomised(LEARNED[cls](layers, heads, group, dim, hidden))
        return learned
    arguments = inspect.signature(cls).parameters
    if cls.table_argument and arguments[cls.table_argument].default is not None:
        few = {name: 2 for name in ("pool_size", "sink", "recent") if name in arguments}  # of prompts of tens of tokens
        return cls(**few, **{cls.table_argument: made_up(cls.table_argument, layers, heads, group, dim, hidden)})
    if "base" in arguments and arguments["base"].default is inspect.Parameter.empty:
        return cls(SnapKV(window=8))
    if "level" in arguments:
        return cls(0.05)
    return cls()
