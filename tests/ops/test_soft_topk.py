"""Exact soft top-k: sums, limits, protected and absent entries, gradients to scores and budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from learnkv.ops.soft_topk import soft_topk

INF = float("inf")


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(3, 200),
    share=st.floats(0.02, 0.98),
    temperature=st.sampled_from([0.05, 0.5, 2.0]),
)
def test_probabilities_sum_to_the_budget(seed: int, size: int, share: float, temperature: float) -> None:
    scores = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    count = torch.full((2, 3), share * size, dtype=torch.float64)
    mask = soft_topk(scores, count, temperature)
    torch.testing.assert_close(mask.sum(-1), count, rtol=1e-9, atol=0)
    assert (mask.gather(-1, scores.argsort(dim=-1)).diff(dim=-1) >= 0).all()


def test_cold_limit_is_the_hard_top_k() -> None:
    scores = torch.randperm(64).double()
    mask = soft_topk(scores, torch.tensor(10.0), 1e-2)
    hard = torch.zeros(64, dtype=torch.float64)
    hard[scores.topk(10).indices] = 1
    torch.testing.assert_close(mask, hard, rtol=0, atol=1e-6)


def test_protected_and_absent_entries() -> None:
    scores = torch.tensor([INF, 0.3, -0.2, -INF, 1.0, INF, -INF], requires_grad=True)
    count = torch.tensor(3.5, requires_grad=True)
    mask = soft_topk(scores, count, 0.5)
    assert mask[[0, 5]].tolist() == [1, 1]
    assert mask[[3, 6]].tolist() == [0, 0]
    assert mask.sum().item() == pytest.approx(3.5, abs=1e-5)
    (mask * torch.arange(7.0)).sum().backward()
    assert scores.grad is not None
    assert count.grad is not None
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[[0, 3, 5, 6]].tolist() == [0, 0, 0, 0]
    assert scores.grad.sum().item() == pytest.approx(0, abs=1e-6)  # the sum is fixed by the budget, not by the scores
    assert 1 <= count.grad.item() <= 4  # a mean of the weights of the free entries


def test_rows_without_a_choice_stay_finite() -> None:
    scores = torch.tensor([[INF, INF, -INF], [-INF, -INF, -INF], [INF, 0.5, 0.1], [0.1, 0.2, 0.3]], requires_grad=True)
    mask = soft_topk(scores, torch.tensor([2.0, 0.0, 0.5, 3.0]), 0.5)
    expected = torch.tensor([[1.0, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]])
    torch.testing.assert_close(mask, expected, rtol=0, atol=1e-5)
    mask.square().sum().backward()
    assert scores.grad is not None
    assert torch.isfinite(scores.grad).all()


def test_gradient() -> None:
    scores = torch.randn(2, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    count = torch.tensor([2.3, 6.9], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, k: soft_topk(s, k, 0.5), (scores, count))
    fixed = torch.tensor([[INF, -INF], [INF, -INF]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s, k: soft_topk(torch.cat([s, fixed], -1), k, 0.5), (scores, count))
