"""Tiers set by hand: shares of what is kept, within the bytes, and bad shares are named."""

import pytest
import torch
from support.models import attached, padded, tokens

from learnkv import Policy, prefill
from learnkv.allocators import AdaKV, Allocator, LearnedAllocator, Uniform
from learnkv.errors import UserError
from learnkv.evaluation.precisions import at_precision, check_precisions
from learnkv.precision import FixedTiers
from learnkv.scorers import SnapKV

LAYERS, HEADS, LENGTHS = 3, 2, (57, 40)


@pytest.mark.parametrize(
    "allocator", [Uniform(), AdaKV(), LearnedAllocator(Uniform(), LAYERS, HEADS, by="scores")], ids=str
)
@pytest.mark.parametrize("asked", [0.1, 0.23, 0.3])
def test_shares_of_the_kept_entries_have_each_level_within_the_bytes(allocator: Allocator, asked: float) -> None:
    precision = FixedTiers(["K4V2", "K4V3", "K8V4"], [0.5, 0.3, 0.2])
    made = Policy(SnapKV(window=8), allocator, sinks=2, recent=3, precision=precision)
    cache = prefill(attached("llama"), *padded([tokens(1, n)[0] for n in LENGTHS]), policies=[made])
    plan = made.plan(cache, bytes=asked)
    assert plan.levels is not None
    counts = plan.levels.counts.double()
    by_row = counts.sum((1, 3)).T if allocator.needs_scores and isinstance(allocator, LearnedAllocator) else None
    for shares in counts.movedim(0, -1).flatten(0, 2) if by_row is None else by_row:
        total = shares.sum()
        assert shares[2] == pytest.approx(float(0.2 * total), abs=1)
        assert shares[1] == pytest.approx(float(0.3 * total), abs=2)
    spend = made.byte_budget(cache, asked)
    assert spend is not None
    cost = max(level.entry_bytes(16) for level in precision.levels)
    heads = 1 if by_row is not None else LAYERS * HEADS
    for size, most in zip(made.compress(cache, bytes=asked).row_nbytes(), spend.asked, strict=True):
        assert most - 2 * cost * heads < size <= most


def test_the_best_have_the_highest_level() -> None:
    precision = FixedTiers(["K4V2", "K8V3"], [0.75, 0.25])
    scores = torch.tensor([3.0, 9.0, 1.0, 7.0, 5.0, 2.0]).view(1, 1, 1, 6)
    cost = [level.entry_bytes(16) for level in precision.levels]
    plan = precision.shares(scores, torch.tensor([3 * cost[0] + cost[1]]), [16])
    assert plan.counts.flatten().tolist() == [3, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": (0.5, 0.4)}, "expected a sum of 1, got 0.9"),
        ({"shares": (0.5, 0.3, 0.2)}, "expected 2 numbers between 0 and 1"),
        ({"shares": (1.0, 0.0)}, "expected 2 numbers between 0 and 1"),
        ({"menu": ("K5V3", "K8V3")}, "expected 16, 8, 4, 3, 2 bits"),
    ],
)
def test_bad_shares_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FixedTiers(**arguments)


def test_tiers_on_the_command_line() -> None:
    policy = Policy(SnapKV(window=8))
    assert at_precision(policy, "k4v2:0.75+k8v3:0.25").precision_name == "K4V2:0.75+K8V3:0.25"
    with pytest.raises(UserError, match="expected a sum of 1"):
        check_precisions(["K4V2:0.75+K8V3:0.5"])
    with pytest.raises(UserError, match="expected bits such as 4 or K4V3"):
        check_precisions(["K4V2:0.75+K8V3"])
    with pytest.raises(UserError, match="expected different ones"):
        check_precisions(["K4V2:0.75+K8V3:0.25", "k4v2:.75+k8v3:.25"])
