"""The least concave function above points, against SciPy-free geometry: every point lies on it or below."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnkv.ops.concave_envelope import envelope_slopes


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 5))
def test_it_is_concave_above_all_points_and_touches_them(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    cost = torch.randint(1, 60, (3, count), generator=generator).cumsum(-1).double()
    quality = 2 * torch.rand(3, count, generator=generator, dtype=torch.float64) - 1
    slopes = envelope_slopes(quality, cost)
    assert (slopes.diff(dim=-1) <= 1e-12).all()
    height = (slopes * cost.diff(dim=-1, prepend=torch.zeros(3, 1))).cumsum(-1)
    assert (height >= quality - 1e-9).all()
    # A corner is a point; so is the last one.
    corner = torch.cat([slopes[:, :-1] > slopes[:, 1:] + 1e-12, torch.ones(3, 1, dtype=torch.bool)], -1)
    torch.testing.assert_close(height[corner], quality[corner])


def test_a_level_below_the_others_gets_no_gradient_until_they_are_gone() -> None:
    cost = torch.tensor([10.0, 20.0, 40.0])
    quality = torch.tensor([0.1, 0.8, 0.9], requires_grad=True)  # the first lies below the line to the second
    slopes = envelope_slopes(quality, cost)
    torch.testing.assert_close(slopes, torch.tensor([0.04, 0.04, 0.005]))
    (gradient,) = torch.autograd.grad(slopes[0], quality)
    assert gradient.tolist() == [0, torch.tensor(1 / 20).item(), 0]
