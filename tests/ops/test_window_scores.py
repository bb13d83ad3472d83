"""Window scores against the definition written out in loops, in float64."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from support.observations import observe
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.errors import UserError
from learnkv.ops.window_scores import reference, window_scores

REDUCE = {"mean": lambda x: sum(x) / len(x), "max": max, "sum": sum}


def run(obs: Observation, kernel_size: int = 3, **options: Any) -> Tensor:
    return window_scores(
        obs.queries,
        obs.keys,
        query_positions=obs.query_positions,
        positions=obs.positions,
        valid=obs.valid,
        scaling=obs.scaling,
        kernel_size=kernel_size,
        **options,
    )


def pooled(row: list[float], kernel_size: int, pooling: str) -> list[float]:
    half, result = kernel_size // 2, []
    for j in range(len(row)):
        near = row[max(j - half, 0) : j + half + 1]
        result.append(max(near) if pooling == "max" else sum(near) / kernel_size)
    return result


def by_definition(
    obs: Observation,
    row: int,
    head: int,
    kernel_size: int,
    pooling: str,
    window_reduce: str,
    group_reduce: str,
    group_first: bool,
) -> list[float]:
    """Scores of the valid entries of one head, which must be a stretch of slots without holes."""
    there = obs.valid[row, head]
    keys, positions = obs.keys[row, head, there].double(), obs.positions[row, head, there].tolist()
    asking = [i for i, at in enumerate(obs.query_positions[row].tolist()) if at >= 0]
    start = int(obs.query_positions[row, asking[0]])
    group = obs.queries.shape[1] // obs.keys.shape[1]
    per_query_head = []
    for query_head in range(head * group, (head + 1) * group):
        given: dict[int, list[float]] = {at: [] for at in positions}
        for i in asking:
            query, at = obs.queries[row, query_head, i].double(), int(obs.query_positions[row, i])
            powers = {
                p: math.exp(obs.scaling * float(query @ key)) for p, key in zip(positions, keys, strict=True) if p <= at
            }
            for p, power in powers.items():
                given[p].append(power / sum(powers.values()))
        factor = len(asking) if window_reduce == "sum" else 1
        per_query_head.append([factor * sum(seen_by) / len(seen_by) for seen_by in given.values()])

    past = sum(at < start for at in positions)

    def apart(scores: list[float]) -> list[float]:
        return pooled(scores[:past], kernel_size, pooling) + pooled(scores[past:], kernel_size, pooling)

    if group_first:
        return apart([REDUCE[group_reduce](column) for column in zip(*per_query_head, strict=True)])
    return [REDUCE[group_reduce](column) for column in zip(*map(apart, per_query_head), strict=True)]


OPTIONS = list(itertools.product([1, 5], ["avg", "max"], ["mean", "sum"], ["mean", "max", "sum"], [True, False]))


@pytest.mark.parametrize(("kernel_size", "pooling", "window_reduce", "group_reduce", "group_first"), OPTIONS)
def test_every_option_against_the_definition(
    kernel_size: int, pooling: str, window_reduce: str, group_reduce: str, group_first: bool
) -> None:
    obs = observe([19, 11, 6, 3, 1], window=6, dim=4)
    options = {
        "pooling": pooling,
        "window_reduce": window_reduce,
        "group_reduce": group_reduce,
        "group_first": group_first,
    }
    got = run(obs, kernel_size, **options)
    for row, head in itertools.product(range(5), range(2)):
        want = by_definition(obs, row, head, kernel_size, **options)
        there = obs.valid[row, head]
        torch.testing.assert_close(got[row, head, there].double(), torch.tensor(want).double(), rtol=1e-5, atol=1e-7)
        assert (got[row, head, ~there] == 0).all()


@pytest.mark.parametrize(("kernel_size", "pooling"), [(1, "avg"), (5, "avg"), (5, "max")])
def test_query_heads_apart_get_what_each_gets_alone(kernel_size: int, pooling: str) -> None:
    obs = observe([19, 6], window=6, dim=4, group=3)
    got = run(obs, kernel_size, pooling=pooling, group_reduce="none")
    assert got.shape == (2, 2, 3, 19)
    for member in range(3):
        alone = dataclasses.replace(obs, queries=obs.queries[:, member::3])
        torch.testing.assert_close(got[:, :, member], run(alone, kernel_size, pooling=pooling))


@pytest.mark.parametrize("group_reduce", ["mean", "none"])
def test_long_prompts_are_read_in_stretches_with_the_same_result(
    group_reduce: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    obs = observe([500, 130], window=6, dim=4)
    once = run(obs, group_reduce=group_reduce)
    monkeypatch.setattr(reference, "_FEW", 0)
    stretches = run(obs, group_reduce=group_reduce)
    assert not torch.equal(once, stretches)  # another order of sums
    torch.testing.assert_close(once, stretches)


def test_even_attention_by_hand() -> None:
    """Zero keys: a query at position p gives 1/(p+1) to each of the entries it sees."""
    obs = observe([5], window=2, heads=1)
    obs = dataclasses.replace(obs, keys=torch.zeros_like(obs.keys))
    past = (1 / 4 + 1 / 5) / 2
    flat = run(obs, kernel_size=1).flatten()
    torch.testing.assert_close(flat, torch.tensor([past, past, past, past, 1 / 5]))
    mean = run(obs, kernel_size=3).flatten()
    window = (past + 1 / 5) / 3
    torch.testing.assert_close(mean, torch.tensor([past * 2 / 3, past, past * 2 / 3, window, window]))


def test_neither_past_nor_window_is_pooled_with_the_other() -> None:
    """A spike on the last entry of the past must not reach the window, nor one in the window the past."""
    obs = observe([12], window=4, heads=1, group=1, dim=1)
    spiked = torch.zeros_like(obs.keys)
    spiked[..., 7, :] = 30.0
    queries = torch.ones_like(obs.queries)
    scores = run(dataclasses.replace(obs, keys=spiked, queries=queries, scaling=1.0), 5, pooling="max").flatten()
    assert (scores[5:8] > 0.99).all()
    assert (scores[:5] < 1e-6).all()
    assert (scores[8:] < 1e-6).all()
    spiked = spiked.roll(1, dims=2)
    scores = run(dataclasses.replace(obs, keys=spiked, queries=queries, scaling=1.0), 5, pooling="max").flatten()
    assert (scores[8:11] > 0.99).all()
    assert (scores[:8] < 1e-6).all()


def test_entries_of_the_window_are_seen_by_later_queries_only() -> None:
    """The second query must not see the third's key, however well it fits."""
    obs = observe([6], window=3, heads=1, group=1, dim=1)
    keys = torch.zeros_like(obs.keys)
    keys[..., 5, :] = 50.0
    scores = run(dataclasses.replace(obs, keys=keys, queries=torch.ones_like(obs.queries), scaling=1.0), 1).flatten()
    torch.testing.assert_close(scores[5], torch.tensor(1.0))
    torch.testing.assert_close(scores[0], torch.tensor((1 / 4 + 1 / 5) / 3))


def test_evicted_entries_leave_a_gap_and_take_no_attention() -> None:
    """Holes: the others get what they get when the entries between were never there, but for the pooling."""
    obs = observe([20], window=4, heads=1)
    there = torch.ones(20, dtype=torch.bool)
    there[[2, 3, 7, 11]] = False
    holes = dataclasses.replace(obs, valid=there.expand(1, 1, 20))
    without = dataclasses.replace(
        obs, keys=obs.keys[:, :, there], valid=holes.valid[:, :, there], positions=obs.positions[:, :, there]
    )
    torch.testing.assert_close(run(holes, 1)[:, :, there], run(without, 1))
    assert (run(holes, 1)[0, 0, ~there] == 0).all()


def test_the_softmax_is_in_float32() -> None:
    """In bfloat16, whose steps near 1 are 1/128, weights of 1/512 would come out rounded."""
    obs = observe([511], window=1, heads=1)
    obs = dataclasses.replace(obs, keys=torch.zeros_like(obs.keys).bfloat16(), queries=obs.queries.bfloat16())
    scores = run(obs, 1)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 511), rtol=1e-6, atol=0)


def test_an_implementation_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="impl='nonsense'"):
        run(observe([5]), impl="nonsense")
