"""AdaKV as deployed; the published rounding is in the golden tests."""

import pytest
import torch
from torch import Tensor

from learnkv.allocators import AdaKV, Pyramid, Uniform
from learnkv.core.allocator import Allocator
from learnkv.errors import UserError

INF = torch.inf


def share(adakv: AdaKV, scores: Tensor, budget: float) -> list[float]:
    """Wishes [H] for the scores [H, S] of a single layer."""
    return adakv(scores[None, None], None, torch.tensor([budget], dtype=torch.float64)).flatten().tolist()


HEADS = torch.tensor([[9.0, 8.0, 7.0, 1.0], [6.0, 0.5, 0.4, 0.3], [0.2, 0.1, 0.2, 0.1]])


def test_heads_get_what_they_have_among_the_best() -> None:
    assert share(AdaKV(floor=0.0), HEADS, 4 / 3) == pytest.approx([3, 1, 0])
    assert share(AdaKV(floor=0.0), HEADS, 2) == pytest.approx([4, 2, 0])


def test_the_floor_mixes_in_equal_shares() -> None:
    assert share(AdaKV(floor=0.25), HEADS, 2) == pytest.approx([3.5, 2, 0.5])
    assert share(AdaKV(floor=1.0), HEADS, 2) == pytest.approx([2, 2, 2])


def test_protected_entries_count_for_their_own_head() -> None:
    scores = HEADS.clone()
    scores[:, 0] = INF
    assert share(AdaKV(floor=0.0), scores, 2) == pytest.approx([3.0 + 1, 1, 1])
    assert share(AdaKV(floor=0.5), scores, 2) == pytest.approx([3, 1.5, 1.5])


def test_scores_far_apart_leave_a_head_with_the_floor() -> None:
    scores = torch.rand(4, 100, generator=torch.Generator().manual_seed(0))
    scores[2] += 10
    got = share(AdaKV(floor=0.2), scores, 25)
    assert got == pytest.approx([5, 5, 85, 5])


def test_negative_scores_are_compared_like_any_other() -> None:
    assert share(AdaKV(floor=0.0), HEADS - 100, 4 / 3) == pytest.approx([3, 1, 0])


def test_ties_go_to_the_lower_head() -> None:
    assert share(AdaKV(floor=0.0), torch.ones(3, 4), 2) == pytest.approx([4, 2, 0])


def test_normalize_weights_a_head_by_how_concentrated_it_is() -> None:
    """Head 0 spreads its mass, head 1 has nearly all of it in its best two: 0.5 against 0.99."""
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.9, 0.89, 0.01, 0.01]])
    assert share(AdaKV(floor=0.0), scores, 2) == pytest.approx([4, 0])
    assert share(AdaKV(floor=0.0, normalize=True), scores, 2) == pytest.approx([2, 2])


@pytest.mark.parametrize("base", [Uniform(), Pyramid(beta=10, protected=3)])
@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("budget", [4.5, 7.3, 20.9])
def test_each_layer_keeps_its_total(base: Allocator, floor: float, budget: float) -> None:
    scores = torch.rand(5, 1, 4, 50, generator=torch.Generator().manual_seed(0)) ** 3
    scores[..., -2:] = INF
    asked = torch.tensor([budget], dtype=torch.float64)
    got = AdaKV(base, floor)(scores, None, asked)
    torch.testing.assert_close(got.sum(-1), base(scores, None, asked).sum(-1))
    assert (got >= 2).all()


def test_a_floor_of_the_average_layer_moves_layers_towards_each_other() -> None:
    """As in LAVa: the steep layers give a floor's worth of what they have above the average."""
    scores = torch.rand(5, 1, 4, 50, generator=torch.Generator().manual_seed(0)) ** 3
    scores[..., -2:] = INF
    asked = torch.tensor([12.0], dtype=torch.float64)
    layers = {
        how: AdaKV(Pyramid(beta=10, protected=2), 0.25, floor_of=how)(scores, None, asked).sum(-1)[:, 0]
        for how in ("layer", "average")
    }
    torch.testing.assert_close(layers["average"], 0.75 * layers["layer"] + 0.25 * layers["layer"].mean())


def test_it_asks_what_its_base_asks() -> None:
    base = Pyramid()
    base.window = 5
    assert AdaKV(base).window == 5
    assert not AdaKV(base).static


@pytest.mark.parametrize("floor", [-0.1, 1.5])
def test_a_floor_is_a_fraction(floor: float) -> None:
    with pytest.raises(UserError, match=f"floor={floor}"):
        AdaKV(floor=floor)
