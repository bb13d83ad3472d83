"""A learned policy at initialisation keeps what its base policy keeps."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.models import attached, kept, padded, tokens

from learnkv import Policy, prefill
from learnkv.allocators import (
    AdaKV,
    Allocator,
    Flat,
    LayerByLayer,
    LearnedAllocator,
    LearnedSequentialAllocator,
    Pyramid,
    Uniform,
)
from learnkv.scorers import (
    CAKE,
    H2O,
    ExpectedAttention,
    GateScorer,
    HiddenScorer,
    KeyDiff,
    LAVa,
    LearnedScorer,
    ReSTKV,
    SnapKV,
)

LAYERS, HEADS = 3, 2  # of the tiny Llama
KEEPS = [0.02, 0.021, 0.03, 0.05, 0.0625, 0.08, 0.1, 0.123, 0.15, 0.2, 0.25, 0.29, 1 / 3, 0.4, 0.45, 0.5, 0.55, 0.6]


START = {
    "keys": lambda base: LearnedScorer(base, LAYERS, HEADS, 16),
    "hidden": lambda base: HiddenScorer(base, LAYERS, HEADS, 16, 48),
    "gate": lambda base: GateScorer(base, LAYERS, HEADS, 48, num_groups=2),
}
BASES = {
    "uniform": Uniform,
    "pyramid": Pyramid,
    "ada": AdaKV,
    "both": lambda: AdaKV(Pyramid()),
    "flat": Flat,
}


FORMS = [(form, by) for form in ("heads", "keys") for by in ("shares", "conditioned", "scores")]


@pytest.mark.parametrize(("tokenwise", "by"), [*FORMS, ("hidden", "scores"), ("gate", "scores")])
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_at_initialisation_a_learned_policy_keeps_what_the_heuristic_keeps(
    tokenwise: str, base: type[Any], by: str
) -> None:
    follows = "scores" if by == "scores" else "shares"
    check_start(base, tokenwise, LearnedAllocator(base(), LAYERS, HEADS, conditioned=by == "conditioned", by=follows))


@pytest.mark.parametrize("base", [Uniform, Pyramid, lambda: LayerByLayer(Pyramid())], ids=["uniform", "pyramid", "ada"])
@pytest.mark.parametrize("conditioned", [False, True], ids=["static", "conditioned"])
def test_at_initialisation_a_sequential_policy_keeps_what_the_heuristic_keeps(
    base: Callable[..., Any] | type[Any], conditioned: bool
) -> None:
    check_start(base, "keys", LearnedSequentialAllocator(base(), LAYERS, HEADS, conditioned=conditioned))


@pytest.mark.parametrize("tokenwise", START)
@pytest.mark.parametrize("scorer", [ExpectedAttention, KeyDiff, H2O, LAVa, CAKE, ReSTKV])
def test_at_initialisation_a_learned_policy_keeps_what_any_scorer_keeps(scorer: type[Any], tokenwise: str) -> None:
    allocator = LearnedAllocator(AdaKV(), LAYERS, HEADS, by="scores")
    check_start(AdaKV, tokenwise, allocator, scorer, KEEPS[::5])


def check_start(
    base: Callable[..., Any] | type[Any],
    tokenwise: str,
    allocator: Allocator,
    scorer: type[Any] = SnapKV,
    keeps: Sequence[float] = KEEPS,
) -> None:
    learned = Policy(START[tokenwise](scorer()) if tokenwise in START else scorer(), allocator)
    heuristic = Policy(scorer(), base())
    assert learned.base_policy().spec() == heuristic.spec()
    prompts = padded([tokens(1, length, seed=3)[0] for length in (137, 60, 97)])
    whole = prefill(attached("llama"), *prompts, policies=[learned, heuristic])
    for keep in keeps:
        ours, theirs = (policy.compress(whole.fork(), keep=keep) for policy in (learned, heuristic))
        assert torch.equal(ours.budgets, theirs.budgets)
        assert [kept(ours, row) for row in range(3)] == [kept(theirs, row) for row in range(3)]
