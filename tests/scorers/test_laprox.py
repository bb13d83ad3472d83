"""LaProx against its formula, in double precision, and its shares of the budget."""

import dataclasses

import pytest
import torch
from support.models import attached, tokens
from support.observations import observe
from torch import Tensor

from learnkv import Policy, load_policy, prefill
from learnkv.core.observation import Observation
from learnkv.policy.budget import Protected
from learnkv.scorers import LaProx

WINDOW = 8


def by_formula(obs: Observation, group: str, kernel_size: int) -> Tensor:
    """Scores [H, S - W] of the entries before the window of an unpadded row, one query head after the other."""
    heads, members = obs.keys.shape[1], obs.num_key_value_groups
    slots, dim = obs.keys.shape[2], obs.keys.shape[3]
    queries, keys, values = (part[0].double() for part in (obs.queries[:, :, -WINDOW:], obs.keys, obs.values))
    weight = obs.projection.double()
    attention, sizes = {}, {}
    for head in range(heads * members):
        logits = queries[head] @ keys[head // members].T * obs.scaling
        hidden = torch.arange(slots) > torch.arange(slots - WINDOW, slots).unsqueeze(-1)
        attention[head] = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        part = weight[:, head * dim : (head + 1) * dim]
        sizes[head] = (values[head // members] @ part.T).norm(dim=-1)[:-WINDOW]

    def pooled(weights: Tensor) -> Tensor:
        norms = torch.nn.functional.pad(weights.norm(dim=0)[:-WINDOW], (kernel_size // 2, kernel_size // 2))
        return norms.unfold(0, kernel_size, 1).mean(-1)

    scores = []
    for head in range(heads):
        own = range(head * members, (head + 1) * members)
        if group == "attention":
            mean = torch.stack([attention[one] for one in own]).mean(0)
            scores.append(pooled(mean) * torch.stack([sizes[one] for one in own]).mean(0))
        else:
            complete = torch.stack([pooled(attention[one]) * sizes[one] for one in own])
            scores.append(complete.mean(0) if group == "mean" else complete.sum(0))
    result = torch.stack(scores)
    return result / result.sum()


@pytest.mark.parametrize("group", ["attention", "mean", "sum"])
@pytest.mark.parametrize("kernel_size", [1, 7])
def test_scores_are_those_of_the_formula(group: str, kernel_size: int) -> None:
    obs = observe([40])
    got = LaProx(WINDOW, kernel_size, group=group)(obs)[0, :, :-WINDOW]
    torch.testing.assert_close(got.double(), by_formula(obs, group, kernel_size), rtol=1e-4, atol=1e-7)
    assert float(got.sum()) == pytest.approx(1, rel=1e-4)
    together = LaProx(WINDOW, kernel_size, group=group, shared=True)(obs)[0, :, :-WINDOW]
    torch.testing.assert_close(together, got.mean(0, keepdim=True).expand_as(got))


def test_readings_differ() -> None:
    obs = observe([40])
    orders = [LaProx(WINDOW, group=group)(obs)[0].flatten().argsort().tolist() for group in ("attention", "mean")]
    assert orders[0] != orders[1]


def test_a_layer_with_larger_values_gets_no_larger_share() -> None:
    policy = load_policy("laprox")
    cache = prefill(attached("llama"), tokens(1, 90), policies=[policy])
    observations = [layer.observation() for layer in cache.compressed_layers()]
    budgets = []
    for factor in (1, 10):
        changed = [dataclasses.replace(observations[1], values=factor * observations[1].values)]
        plan = policy.planner.plan([observations[0], *changed, *observations[2:]], [90], [160], Protected.of_edges([6]))
        assert int(plan.budgets.sum()) == 160
        budgets.append(plan.budgets)
    assert torch.equal(*budgets)
    assert budgets[0].unique().numel() > 2


def test_the_budget_is_exact_in_every_row() -> None:
    cache = prefill(
        attached("llama"), tokens(2, 61), policies=[policy := Policy(LaProx(), load_policy("laprox").allocator)]
    )
    small = policy.compress(cache, keep=0.21)
    assert small.budgets.sum((0, 2)).tolist() == [round(0.21 * 61 * 6)] * 2
