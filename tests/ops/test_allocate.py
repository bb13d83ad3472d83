"""Exact bounded-logistic allocation: the budget is met, the prior is reproduced, the gradient is the true one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnkv.ops.allocate import allocate


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    heads=st.integers(1, 40),
    spread=st.floats(0, 30),
    low=st.floats(0, 0.4),
    above=st.floats(0.001, 0.999),
)
def test_mean_is_met_and_bounds_hold(seed: int, heads: int, spread: float, low: float, above: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(3, heads, generator=generator)
    floor = torch.full((3,), low, dtype=torch.float64)
    mean = floor + (1 - floor) * above
    shares = allocate(logits, mean, floor)
    torch.testing.assert_close(shares.mean(-1), mean, rtol=0, atol=1e-12)
    assert (shares >= floor[:, None]).all()
    assert (shares <= 1).all()
    assert (shares.gather(-1, logits.argsort(dim=-1)).diff(dim=-1) >= 0).all()


def test_logits_of_shares_give_the_shares_back() -> None:
    shares = torch.rand(4, 24, dtype=torch.float64) * 0.8 + 0.1
    low = torch.full((4,), 0.05, dtype=torch.float64)
    logits = torch.logit((shares - 0.05) / 0.95)
    torch.testing.assert_close(allocate(logits, shares.mean(-1), low), shares, rtol=0, atol=1e-14)
    torch.testing.assert_close(allocate(logits + 3.7, shares.mean(-1), low), shares, rtol=0, atol=1e-14)


@pytest.mark.parametrize("low", [0.0, 0.07])
def test_gradient(low: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (2 * torch.randn(3, 7, generator=generator, dtype=torch.float64)).requires_grad_()
    mean = torch.tensor([0.1, 0.35, 0.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, m: allocate(a, m, torch.full((3,), low)), (logits, mean))


def test_unreachable_mean_is_the_nearest_bound() -> None:
    low = torch.tensor([0.2, 0.2], dtype=torch.float64)
    shares = allocate(torch.randn(2, 5), torch.tensor([0.1, 1.2]), low)
    torch.testing.assert_close(shares[0], torch.full((5,), 0.2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(shares[1], torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-9)
