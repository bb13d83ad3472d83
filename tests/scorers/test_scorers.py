"""Numbers of the single scorers."""

import dataclasses

import pytest
import torch
from support.observations import observe

from learnkv.errors import UserError
from learnkv.scorers import Knorm, Random, SnapKV, StreamingLLM


def test_streaming_llm_puts_sinks_first_and_the_latest_next() -> None:
    scores = StreamingLLM(sinks=2)(observe([6, 1]))
    assert scores[0, 0].argsort(descending=True).tolist() == [0, 1, 5, 4, 3, 2]
    assert scores[1, 0, -1] > scores[0, 0, -1]  # the only entry of a row is its first


def test_streaming_llm_tells_all_positions_apart() -> None:
    obs = observe([8])
    far = dataclasses.replace(obs, positions=obs.positions + 10_000_000)
    assert StreamingLLM(sinks=4)(far).diff(dim=-1).eq(1).all()


def test_streaming_llm_without_sinks_is_the_recent_window() -> None:
    assert StreamingLLM(sinks=0)(observe([6]))[0, 0].argsort(descending=True).tolist() == [5, 4, 3, 2, 1, 0]


def test_knorm_prefers_small_keys() -> None:
    obs = observe([3], heads=1, dim=2)
    keys = torch.tensor([[[[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]]]])
    assert Knorm()(dataclasses.replace(obs, keys=keys)).flatten().tolist() == [-5.0, 0.0, -1.0]


def test_random_is_a_function_of_seed_layer_head_and_position() -> None:
    obs = observe([4000], heads=4, group=1, dim=1)
    scores = Random(seed=3)(obs)
    assert torch.equal(scores, Random(seed=3)(observe([4000], heads=4, group=1, dim=1, seed=5)))
    others = [
        Random(seed=4)(obs),
        Random(seed=3)(dataclasses.replace(obs, layer_idx=2)),
        Random(seed=3)(dataclasses.replace(obs, positions=obs.positions + 1)),
        scores.roll(1, dims=1),
        scores.roll(1, dims=2),
    ]
    for other in others:
        both = torch.stack([scores.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.04  # 16,000 draws: five standard deviations


def test_random_is_uniform() -> None:
    scores = Random()(observe([4096], heads=8, group=1, dim=1)).flatten()
    counts = scores.histc(32, 0.0, 1.0)
    assert scores.min() >= 0
    assert scores.max() < 1
    assert ((counts - 1024).abs() < 5 * 1024**0.5).all()


def test_random_never_changes() -> None:
    """Results in print must be reproducible with later releases."""
    scores = Random(seed=7)(observe([3], heads=1))
    assert (scores * 2**24).flatten().tolist() == [15257412, 15691564, 16327120]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("group_reduce", ["mean", "max", "sum"])
def test_snapkv_window_sum_is_the_mean_times_the_queries(pooling: str, group_reduce: str) -> None:
    obs = observe([40, 5])
    mean, total = (
        SnapKV(8, 5, pooling, window_reduce=how, group_reduce=group_reduce, group_first=False)(obs)
        for how in ("mean", "sum")
    )
    torch.testing.assert_close(total[0], 8 * mean[0])
    torch.testing.assert_close(total[1], 5 * mean[1])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"window": 0}, "window=0"), ({"kernel_size": 4}, "kernel_size=4"), ({"kernel_size": -1}, "odd")],
)
def test_snapkv_refuses_what_makes_no_sense(arguments: dict[str, int], word: str) -> None:
    with pytest.raises(UserError, match=word):
        SnapKV(**arguments)


def test_streaming_llm_refuses_negative_sinks() -> None:
    with pytest.raises(UserError, match="sinks=-1"):
        StreamingLLM(sinks=-1)
