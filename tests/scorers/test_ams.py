"""Adaptive mass segments: budgets that end, exact counts, and the credit that entries carry."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from support.models import attached, tokens
from support.observations import observe

from learnkv import Policy, continuation, prefill
from learnkv.errors import UserError
from learnkv.ops.mass_segments import mass_segments, segment_budgets
from learnkv.scorers import AMS, KeyDiff
from learnkv.scorers.ams import Credit


def segments_of(mass: torch.Tensor, *sizes: float) -> list[tuple[int, int]]:
    bounds = mass_segments(mass, torch.tensor(len(mass)), *sizes).tolist()
    return [pair for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]


def budgets_of(lengths: Sequence[int], masses: Sequence[float], total: int, least: int) -> list[int]:
    return segment_budgets(
        torch.tensor(lengths), torch.tensor(masses, dtype=torch.float64), torch.tensor(total), least
    ).tolist()


def test_segments_hold_a_step_of_mass_within_their_lengths() -> None:
    mass = torch.full((100,), 0.01)
    assert segments_of(mass, 0.25, 1, 100) == [(0, 24), (24, 49), (49, 74), (74, 100)]
    assert segments_of(mass, 0.5, 1, 20) == [(0, 20), (20, 40), (40, 49), (49, 69), (69, 89), (89, 100)]
    assert segments_of(mass, 0.25, 30, 100) == [(0, 49), (49, 100)]
    peak = torch.zeros(100)
    peak[50] = 1
    assert segments_of(peak, 0.1, 1, 100) == [(0, 50), (50, 100)]
    assert segments_of(torch.ones(1), 0.1, 4, 8) == [(0, 1)]


@pytest.mark.parametrize("total", [1, 9, 40, 61])
def test_heads_of_other_lengths_beside_it_change_nothing(total: int) -> None:
    scorer = AMS(KeyDiff(), step=0.05, shortest=4, longest=16, least=2)
    mass, entries = torch.rand(5, 70, generator=torch.Generator().manual_seed(0)), torch.tensor([70, 61, 61, 64, 69])
    mass = mass.masked_fill(torch.arange(70) >= entries.unsqueeze(-1), 0.0)
    mass = mass / mass.sum(-1, keepdim=True)
    for own, length, bounds, counts in zip(
        mass, entries, *scorer.portions(mass, entries, torch.full_like(entries, total)), strict=True
    ):
        alone, kept = scorer.portions(own[:length], length, torch.tensor(total))
        assert bounds.unique().tolist() == alone.unique().tolist() == sorted({0, *bounds.tolist(), int(length)})
        assert counts[counts > 0].tolist() == kept[kept > 0].tolist()
        assert counts.sum() == total


@pytest.mark.parametrize("total", [1, 2, 3, 7, 20, 59, 60])
def test_budgets_are_exact_also_for_more_segments_than_entries(total: int) -> None:
    """The original does not end for fewer entries than segments."""
    lengths, masses = [10, 1, 20, 4, 25], [0.1, 0.3, 0.05, 0.35, 0.2]
    for least in (0, 1, 8):
        budgets = budgets_of(lengths, masses, total, least)
        assert sum(budgets) == total
        assert all(0 <= count <= length for count, length in zip(budgets, lengths, strict=True))
    if total == 2:
        assert budgets == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("budget", [1, 3, 12, 33, 61])
def test_every_head_keeps_its_budget_and_what_is_protected(budget: int) -> None:
    scorer = AMS(KeyDiff(), window=8, step=0.05, shortest=4, longest=16, least=2)
    obs = observe([61, 30], window=9, statistics=scorer.capture_spec.statistics)
    scores = scorer(obs).masked_fill(~obs.valid, -torch.inf)
    scores[..., -1] = torch.inf
    counts = torch.full((2, 2), budget).minimum(obs.valid.sum(-1))
    chosen = scorer.refine(obs, scores, counts)
    assert torch.equal(chosen.sum(-1).long(), counts)
    assert bool((chosen[..., -1] == 1).all())
    assert bool((chosen[~obs.valid] == 0).all())


def credit_of(cache: object) -> list[torch.Tensor]:
    return [layer.segment.statistics[Credit()] for layer in cache.compressed_layers()]


def test_credit_is_kept_with_the_entries_from_one_eviction_to_the_next() -> None:
    """Each eviction adds 0.2 of the mass and keeps 0.8 of what there was; new tokens begin with nothing."""
    policy = Policy(AMS(KeyDiff(), window=4, shortest=4, longest=16, least=2), evict_interval=8)
    cache = prefill(attached("llama"), tokens(1, 40), policies=[policy])
    whole = cache.fork()
    layers = [layer.observation() for layer in cache.compressed_layers()]
    plan = policy.plan(cache, keep=0.5)
    mass = policy.scorer._mass(layers[0], plan.budgets[0])[1][0] / 0.2
    torch.testing.assert_close(mass.sum(-1), torch.ones(2), rtol=1e-4, atol=0)
    policy.compress(cache, keep=0.5)
    first = credit_of(cache)[0][:20, 0]
    torch.testing.assert_close(first, 0.2 * mass[0, cache.kept_positions(0, 0, 0)])
    assert all(not bool(one.any()) for one in [whole.compressed_layers()[0].capture.statistics[Credit()]])

    before = dict(zip(cache.kept_positions(0, 0, 0).tolist(), first.tolist(), strict=True))
    continuation(attached("llama"), tokens(1, 8, seed=1), cache)
    after = dict(zip(cache.kept_positions(0, 0, 0).tolist(), credit_of(cache)[0][:20, 0].tolist(), strict=True))
    added = {place: value - 0.8 * before.get(place, 0.0) for place, value in after.items()}
    assert min(added.values()) > 0
    assert sum(added.values()) < 0.2 + 1e-5
    assert any(place >= 40 for place in after)


def test_rows_do_not_depend_on_each_other_unless_asked() -> None:
    pairs = []
    for batch in ("rows", "joint"):
        scorer = AMS(KeyDiff(), window=8, step=0.1, shortest=2, longest=16, least=1, credit=0, batch=batch)
        both = observe([50], window=9), observe([50], window=9, seed=1)
        counts = torch.full((1, 2), 20)
        alone = [scorer.refine(obs, scorer(obs), counts) for obs in both]
        joined = {
            name: torch.cat([getattr(obs, name) for obs in both])
            for name in ("queries", "query_positions", "keys", "values", "valid", "positions")
        }
        together = type(both[0])(**{**vars(both[0]), **joined})
        pairs.append((torch.cat(alone), scorer.refine(together, scorer(together), counts.expand(2, -1))))
    assert torch.equal(*pairs[0])
    assert not torch.equal(*pairs[1])


def test_what_cannot_be_done_is_refused() -> None:
    for arguments, word in (
        ({"step": 0}, "step=0"),
        ({"shortest": 9, "longest": 8}, "longest=8"),
        ({"decay": 1}, "decay=1"),
    ):
        with pytest.raises(UserError, match=word):
            AMS(**arguments)
    scorer = AMS(credit=0, batch="joint")
    obs = observe([40, 20], window=33)
    with pytest.raises(UserError, match="batch=joint: expected rows of the same entries"):
        scorer.refine(obs, scorer(obs), torch.full((2, 2), 5))


def test_all_budgets_of_small_cases_end() -> None:
    for lengths in itertools.product((1, 2, 3), repeat=3):
        for total in range(1, sum(lengths) + 1):
            assert sum(budgets_of(lengths, [0.0, 0.5, 0.5], total, 2)) == total
