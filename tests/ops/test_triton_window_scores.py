"""The window kernels against the reference in float64, within an error budget worked out from the inputs."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from support.kernels import DEVICE, ROUNDING, assert_within, capped_with_sinks, poisoned
from support.observations import observe
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from learnkv.core.observation import Observation
from learnkv.ops.window_scores import window_scores

DEFAULTS = {"kernel_size": 5, "pooling": "avg", "window_reduce": "mean", "group_reduce": "mean", "group_first": True}


def on_device(obs: Observation, dtype: torch.dtype = torch.float32) -> Observation:
    moved = {name: getattr(obs, name).to(DEVICE) for name in ("query_positions", "positions", "valid")}
    made = {name: getattr(obs, name).to(DEVICE, dtype) for name in ("queries", "keys")}
    return dataclasses.replace(obs, **moved, **made)


def run(obs: Observation, impl: str, **options: Any) -> Tensor:
    return window_scores(
        obs.queries,
        obs.keys,
        query_positions=obs.query_positions,
        positions=obs.positions,
        valid=obs.valid,
        scaling=obs.scaling,
        terms=obs.terms,
        impl=impl,
        **(DEFAULTS | options),
    )


def double(obs: Observation) -> Observation:
    return dataclasses.replace(obs, queries=obs.queries.double(), keys=obs.keys.double())


def check(obs: Observation, **options: Any) -> None:
    with poisoned():
        got = run(obs, "triton", **options)
    truth = run(double(obs), "reference", **options)
    # Products of inputs are exact to 24 bits or better whatever the inputs are; as in the test of the decode kernel.
    unit = ROUNDING[torch.float32]
    norms = [held.double().nan_to_num().norm(dim=-1).max() for held in (obs.queries, obs.keys)]
    score_error = 4 * unit * obs.scaling * float(norms[0] * norms[1])
    sums = (obs.keys.shape[2] ** 0.5 + 24) * unit
    assert got.dtype == torch.float32
    assert_within(got, truth, (2 * score_error + sums) * truth)
    assert (got.movedim(-1, 2)[~obs.valid] == 0).all()


# All combinations once, spread over shapes whose sizes are odd; padding is NaN in keys and queries alike.
REDUCE = (["mean", "sum"], ["mean", "max", "sum"])
OPTIONS = [
    *itertools.product([5], ["avg", "max"], *REDUCE, [True, False]),
    *itertools.product([1], ["avg"], *REDUCE, [True]),  # one slot: nothing to pool
    *itertools.product([1, 5], ["avg", "max"], REDUCE[0], ["none"], [True]),  # query heads apart
]
SHAPES = [
    {"lengths": [150], "window": 8, "heads": 2, "group": 1, "dim": 32},
    {"lengths": [70, 9], "window": 16, "heads": 1, "group": 2, "dim": 64},
    {"lengths": [131, 5, 20], "window": 21, "heads": 1, "group": 4, "dim": 128},
    {"lengths": [60], "window": 33, "heads": 1, "group": 7, "dim": 40},
    {"lengths": [40], "window": 5, "heads": 2, "group": 8, "dim": 80},
]


def test_soft_cap_and_sinks() -> None:
    for number in (1, 2):
        obs = on_device(observe(**SHAPES[number]))
        check(dataclasses.replace(obs, scaling=1.0, terms=capped_with_sinks(obs.queries.shape[1])))


@pytest.mark.parametrize("at", range(0, len(OPTIONS), 2))
def test_every_option_against_the_truth(at: int) -> None:
    for number in (at, at + 1):
        kernel_size, pooling, window_reduce, group_reduce, group_first = OPTIONS[number]
        check(
            on_device(observe(**SHAPES[number % len(SHAPES)])),
            kernel_size=kernel_size,
            pooling=pooling,
            window_reduce=window_reduce,
            group_reduce=group_reduce,
            group_first=group_first,
        )


@pytest.mark.parametrize("dim", [96, 256])
def test_bfloat16(dim: int) -> None:
    check(on_device(observe([300, 3], window=32, heads=1, group=2, dim=dim), torch.bfloat16))


def test_a_window_of_more_than_one_tile() -> None:
    check(on_device(observe([200], window=90, heads=1, group=2, dim=32)), group_reduce="max")


def test_holes_and_a_head_without_entries() -> None:
    """Entries that were evicted, differently in every head, leave holes; keys there are NaN."""
    obs = observe([200, 90], window=12, heads=3, dim=32)
    there = torch.rand(obs.valid.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    there[0, 1] = False
    keys = obs.keys.masked_fill(~there.unsqueeze(-1), torch.nan)
    for options in ({"pooling": "max"}, {"group_first": False, "group_reduce": "max", "kernel_size": 3}):
        check(on_device(dataclasses.replace(obs, keys=keys, valid=obs.valid & there)), **options)


def test_transposed_keys_and_queries_as_models_make_them() -> None:
    obs = on_device(observe([100], window=8, heads=2, dim=32))
    swapped = [held.transpose(1, 2).contiguous().transpose(1, 2) for held in (obs.queries, obs.keys)]
    assert not swapped[1].is_contiguous()
    check(dataclasses.replace(obs, queries=swapped[0], keys=swapped[1]))


def test_the_normalisers_of_prefill_are_used() -> None:
    """With them shifted by log 2 all weights are halved."""
    obs = on_device(observe([120, 7], window=16, heads=2, group=4, dim=64))
    exact = double(obs)
    keys = exact.keys.masked_fill(~exact.valid.unsqueeze(-1), 0).repeat_interleave(4, 1)
    logits = obs.scaling * exact.queries @ keys.transpose(-1, -2)
    asked = obs.query_positions[:, None, :, None]
    visible = obs.valid.repeat_interleave(4, 1).unsqueeze(2) & (
        obs.positions.repeat_interleave(4, 1).unsqueeze(2) <= asked
    )
    lse = logits.masked_fill(~visible, -torch.inf).logsumexp(-1).float()
    plain, given, halved = (run(obs, "triton", lse=one) for one in (None, lse, lse + 0.6931471805599453))
    torch.testing.assert_close(given, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(halved, plain / 2, rtol=1e-5, atol=0)
    torch.testing.assert_close(run(obs, "reference", lse=lse), plain, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("group_first", "per_slot"), [(True, 2), (False, 2 * 8)])
def test_nothing_of_size_heads_by_window_by_slots_is_made(group_first: bool, per_slot: int) -> None:
    """The largest tensor is that of the scores, or what is pooled, never what the window's queries give one by one."""
    obs = on_device(observe([400], window=8, heads=2, group=8, dim=4))
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: tuple[Any, ...], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Tensor:
            nonlocal largest
            made = func(*args, **(kwargs or {}))
            if isinstance(made, Tensor) and "empty" in str(func):
                largest = max(largest, made.numel())
            return made

    with Watch():
        run(obs, "triton", pooling="max", group_first=group_first)
    assert largest == per_slot * 400
