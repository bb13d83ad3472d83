"""Layers that share by what their attention and their scores look like, as deployed."""

import pytest
import torch
from support.observations import observe

from learnkv.allocators import CAKE, AdaKV, LAVa
from learnkv.errors import UserError

BUDGET = torch.tensor([12.0], dtype=torch.float64)


def test_cake_shares_by_entropy_and_variance() -> None:
    features = torch.tensor([[[[2.0, 0.25], [2.0, 0.75]]], [[[1.0, 2.0], [0.0, 2.0]]]])  # [L, 1, H, 2]
    scores = torch.zeros(2, 1, 2, 40)
    scores[..., -2:] = torch.inf
    assert CAKE()(scores, features, BUDGET)[:, 0].tolist() == [[2 + 10, 2 + 10]] * 2  # 4 * 1 and 1 * 4
    # 4^(1/2) * 1 = 2 and 1 * 4^(1/2) = 2 as well; 4^2 * 1 and 1 * 4^(1/2)
    got = CAKE(tau1=0.5, tau2=2.0)(scores, features, BUDGET)[:, 0, 0]
    assert got.tolist() == pytest.approx([2 + 20 * 16 / 18, 2 + 20 * 2 / 18])


def test_cake_looks_at_the_entries_before_the_window() -> None:
    obs = observe([30], window=5, heads=2, group=2)
    features = CAKE(window=5).features(obs)
    weights = torch.einsum("bhgwd,bhsd->bhgws", obs.queries.unflatten(1, (2, 2)), obs.keys) * obs.scaling
    later = torch.arange(30) > torch.arange(25, 30).unsqueeze(-1)
    past = weights.masked_fill(later, -torch.inf).softmax(-1)[..., :25]
    torch.testing.assert_close(features[..., 0], -(past * past.log()).sum((2, 3, 4)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features[..., 1], past.var(3).sum((2, 3)), rtol=1e-4, atol=1e-6)


def test_a_prompt_within_the_window_has_no_preference() -> None:
    allocator = CAKE(window=8)
    features = torch.stack([allocator.features(observe([6], window=8, layer_idx=layer)) for layer in range(3)])
    assert features.eq(0).all()
    assert allocator(torch.zeros(3, 1, 2, 6), features, torch.tensor([2.0])).isfinite().all()


def test_lava_weighs_layers_by_the_entropy_of_their_scores() -> None:
    scores = torch.zeros(3, 1, 2, 8)
    scores[0] = 0.7  # spread over 14 entries
    scores[1, 0, 0, 0] = 5.0  # all in one
    scores[2, 0, :, :2] = 1.0  # spread over 4
    scores[..., 7] = torch.inf
    half = torch.tensor(4.0).log() / torch.tensor(14.0).log()
    torch.testing.assert_close(LAVa.weights(scores)[:, 0], torch.stack([torch.tensor(1.0), half * 0, half]))
    got = LAVa()(scores, None, torch.tensor([3.0], dtype=torch.float64))[:, 0, 0]
    share = 6 / (1 + float(half))
    assert got.tolist() == pytest.approx([1 + share, 1, 1 + share * float(half)], rel=1e-5)
    both = AdaKV(LAVa(), floor=0.5, floor_of="average")(scores, None, torch.tensor([3.0], dtype=torch.float64))
    assert both[1, 0].tolist() == pytest.approx([1 + 1, 1 + 1])  # what the floor of 0.5 * 2 leaves an empty layer


@pytest.mark.parametrize(
    ("arguments", "told"), [({"window": 1}, "window=1"), ({"tau1": 0.0}, "tau1=0.0"), ({"tau2": -1.0}, "tau2")]
)
def test_cake_tells_what_it_cannot_do(arguments: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        CAKE(**arguments)
