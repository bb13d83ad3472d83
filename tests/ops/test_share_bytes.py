"""A budget of bytes over entries and levels: exact spending, order, gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learnkv.ops.share_bytes import share_bytes
from learnkv.ops.soft_topk import soft_topk

LEVELS, LAYERS, BATCH, HEADS, ENTRIES = 3, 2, 2, 3, 11
COST = torch.tensor([[52, 40], [8, 9], [48, 30]]).unsqueeze(-1).expand(-1, -1, HEADS)


def values(seed: int) -> Tensor:
    """Falling from level to level; the first entries are protected, the last of row 1 absent."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(LEVELS, LAYERS, BATCH, HEADS, ENTRIES, generator=generator, dtype=torch.float64)
    steps = steps.sort(dim=0, descending=True).values
    steps[0, ..., :2] = torch.inf
    steps[:, :, 1, :, -3:] = -torch.inf
    return steps


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), budget=st.integers(600, 4000), of_heads=st.booleans())
def test_it_spends_the_budget_to_within_one_step_and_never_more(seed: int, budget: int, of_heads: bool) -> None:
    steps = values(seed)
    spend = torch.full((LAYERS, BATCH, HEADS), budget // 5) if of_heads else torch.tensor([budget, budget + 7])
    counts = share_bytes(steps, COST, spend)
    assert (counts.diff(dim=0) <= 0).all()
    bytes_of_heads = (counts * COST[:, :, None]).sum(0)
    spent = bytes_of_heads if of_heads else bytes_of_heads.sum((0, 2))
    assert (spent <= spend).all()
    everything = (steps > -torch.inf).sum(-1)
    full = (counts == everything).all(0) if of_heads else (counts == everything).all(0).all(2).all(0)
    assert ((spend - spent < COST.max()) | full).all()


def test_it_takes_the_most_valuable_steps_per_byte() -> None:
    """Against taking one step after the other by hand."""
    steps, budget = values(3), 1500
    counts = share_bytes(steps, COST, torch.tensor([budget, budget]))[:, :, 0]
    order = sorted(
        (-steps[m, layer, 0, head, entry].item(), layer, head, entry, m)
        for m in range(LEVELS)
        for layer in range(LAYERS)
        for head in range(HEADS)
        for entry in range(ENTRIES)
    )
    want, left = torch.zeros(LEVELS, LAYERS, HEADS), budget
    for _, layer, head, _, m in order:
        if COST[m, layer, head] > left:
            break
        left -= int(COST[m, layer, head])
        want[m, layer, head] += 1
    assert torch.equal(counts, want.double())


def test_its_gradient_is_that_of_a_soft_choice_with_costs() -> None:
    steps = values(5).requires_grad_(True)
    weight = torch.randn(LEVELS, LAYERS, BATCH, HEADS, dtype=torch.float64)
    budget = torch.tensor([1500, 1200])
    (share_bytes(steps, COST, budget) * weight).sum().backward()
    free = steps.detach().clone().requires_grad_(True)
    rows, costs = (
        free.transpose(0, 2).flatten(1),
        COST.permute(1, 2, 0)[None, :, :, None].expand(BATCH, -1, -1, ENTRIES, -1),
    )
    costs = costs.permute(0, 1, 4, 2, 3).flatten(1).double()
    soft = soft_topk(rows, budget.double(), 0.5, costs).view(BATCH, LAYERS, LEVELS, HEADS, ENTRIES).sum(-1)
    (soft * weight.permute(2, 1, 0, 3)).sum().backward()
    assert steps.grad is not None
    assert steps.grad.abs().max() > 0
    torch.testing.assert_close(steps.grad, free.grad)


def test_soft_probabilities_times_costs_sum_to_the_budget() -> None:
    scores, cost = torch.randn(4, 50, dtype=torch.float64), torch.randint(1, 9, (4, 50)).double()
    budget = torch.tensor([20.0, 60.0, 100.0, 150.0], dtype=torch.float64)
    soft = soft_topk(scores, budget, 0.5, cost)
    torch.testing.assert_close((soft * cost).sum(-1), budget, rtol=1e-9, atol=0)


def test_gradcheck_of_the_soft_choice() -> None:
    scores = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    cost, budget = (
        torch.randint(1, 5, (2, 9)).double(),
        torch.tensor([6.0, 9.0], dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda s, b: soft_topk(s, b, 0.5, cost), (scores, budget), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("budget", [0, 51])
def test_a_budget_below_the_protected_entries_buys_what_it_can(budget: int) -> None:
    counts = share_bytes(values(1), COST, torch.tensor([budget, budget]))
    assert (counts * COST[:, :, None]).sum((0, 1, 3)).max() <= budget
