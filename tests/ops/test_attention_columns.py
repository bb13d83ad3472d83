"""Column sums and maxima of attention."""

from typing import Any

import pytest
import torch
from support.observations import observe
from torch import Tensor

from learnkv.core.observation import Observation
from learnkv.ops.attention_columns import attention_columns, reference


def columns(obs: Observation, **more: Any) -> Tensor:
    return attention_columns(
        obs.queries,
        obs.keys,
        query_positions=obs.query_positions,
        positions=obs.positions,
        valid=obs.valid,
        scaling=obs.scaling,
        **more,
    )


def by_hand(obs: Observation, reduce: str, weight: Tensor) -> Tensor:
    """One query after the other, in float64."""
    batch, heads, slots = obs.valid.shape
    group = obs.queries.shape[1] // heads
    total = torch.zeros(batch, heads, group, slots, dtype=torch.float64)
    for b, h, g in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(group)):
        for at, position in enumerate(obs.query_positions[b]):
            sees = obs.valid[b, h] & (obs.positions[b, h] <= position)
            if position < 0 or not sees.any():
                continue
            products = obs.keys[b, h, sees].double() @ obs.queries[b, h * group + g, at].double()
            new = torch.zeros(slots, dtype=torch.float64)
            new[sees] = (obs.scaling * products).softmax(-1) * weight[b, at].double()
            row = total[b, h, g]
            total[b, h, g] = row + new if reduce == "sum" else torch.maximum(row, new)
    return total


@pytest.mark.parametrize("reduce", ["sum", "max"])
@pytest.mark.parametrize("window", [1, 7, 29])
def test_every_query_counts_once_whatever_the_block(reduce: str, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    obs = observe([29, 12, 1], window=window)
    weight = torch.rand(obs.query_positions.shape, generator=torch.Generator().manual_seed(0))
    expected = by_hand(obs, reduce, weight)
    for block in (1, 3 * 3 * 2 * 3 * 29, 2**22):
        monkeypatch.setattr(reference, "_BLOCK", block)
        found = columns(obs, reduce=reduce, query_weight=weight)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_query_gives_away_all_of_its_attention() -> None:
    obs = observe([40, 13], window=9)
    torch.testing.assert_close(columns(obs).sum(-1), torch.full((2, 2, 3), 9.0))
