"""Policy gradient: probabilities of draws, their gradient, and a step of training."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import batch, distillation, learned, moved

from learnkv import load_model
from learnkv.core.plan import Plan
from learnkv.errors import UserError
from learnkv.ops.ordered_draw import log_probability
from learnkv.policy.policy import Policy
from learnkv.training.gumbel_noise import with_gumbel_noise
from learnkv.training.objectives import ForwardKL, HiddenMSE, PolicyGradient, ScoreRegression


def model(folder: Path) -> Any:
    return load_model(str(folder))[0]


def test_the_probabilities_of_all_draws_sum_to_one() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5, -torch.inf])
    for count in (1, 2, 3):
        total = 0.0
        for chosen in itertools.permutations(range(4), count):
            rest = [slot for slot in range(4) if slot not in chosen]
            order = torch.tensor([*chosen, *rest, 4])
            log_p = log_probability(scores, order, torch.tensor(0), torch.tensor(count))
            total += float(log_p.exp())
            left, product = scores[:4].exp(), 1.0
            for slot in chosen:
                product *= float(left[slot] / left.sum())
                left[slot] = 0.0
            assert float(log_p.exp()) == pytest.approx(product, rel=1e-4)
        assert total == pytest.approx(1.0, rel=1e-4)


def test_what_is_always_kept_is_no_draw() -> None:
    scores, order = torch.tensor([torch.inf, 0.5, 1.0, -torch.inf]), torch.tensor([0, 2, 1, 3])
    log_p = log_probability(scores, order, torch.tensor(1), torch.tensor(1))
    assert float(log_p) == pytest.approx(float(scores[1:3].log_softmax(0)[1]), rel=1e-5)


def test_a_step_makes_the_better_samples_likelier(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The value is the samples' mean loss, the gradient that of their probabilities times their advantages."""
    objective = PolicyGradient(ForwardKL(), samples=3, noise=0.5)
    module = distillation(model(folder), moved(), objective=objective)
    seen: list[torch.Tensor] = []
    original = PolicyGradient.over_samples

    def recorded(self: PolicyGradient, plan: object, drawn: object, losses: torch.Tensor) -> torch.Tensor:
        seen.append(losses)
        return original(self, plan, drawn, losses)

    monkeypatch.setattr(PolicyGradient, "over_samples", recorded)
    loss = module.training_step(batch(), 0)
    torch.testing.assert_close(loss.detach(), seen[0].mean())
    assert float(seen[0].std(0).min()) > 0
    loss.backward()
    gradients = [weight.grad for weight in module.policy.scorer.parameters() if weight.grad is not None]
    assert any(bool(gradient.abs().sum() > 0) for gradient in gradients)


def test_the_gradient_is_that_of_the_expected_loss() -> None:
    """Entries that make a sample worse become less likely: a loss that counts one entry lowers its score."""
    objective = PolicyGradient(ForwardKL(), samples=64, noise=1.0)
    scores = torch.zeros(1, 1, 1, 6, requires_grad=True)
    plan = learned_plan(scores, keep=2)
    drawn = [with_gumbel_noise(plan, objective.noise, seed) for seed in range(64)]
    losses = torch.stack([sample.kept[0, 0, 0, 3].float().view(1) for sample in drawn])
    objective.over_samples(plan, drawn, losses).sum().backward()
    slope = scores.grad.flatten()
    assert slope[3] > 0  # descent lowers it
    assert float(slope[3]) > 2 * float(slope[[0, 1, 2, 4, 5]].abs().max())


def learned_plan(scores: torch.Tensor, keep: int) -> Plan:
    budgets = torch.full(scores.shape[:3], keep)
    return Plan(scores, budgets.double(), budgets, torch.zeros(1, dtype=torch.long), keep, scores)


def test_what_cannot_be_sampled_is_refused(folder: Path) -> None:
    for arguments in ({"samples": 1}, {"noise": 0.0}):
        with pytest.raises(UserError, match="at least 2 samples"):
            PolicyGradient(ForwardKL(), **arguments)
    with pytest.raises(UserError, match="loss=ScoreRegression"):
        PolicyGradient(ScoreRegression(learned().scorer))
    assert PolicyGradient(HiddenMSE()).hidden
    module = distillation(model(folder), learned(scorer=False), objective=PolicyGradient(ForwardKL()))
    with pytest.raises(UserError, match="expected a learned scorer"):
        module.training_step(batch(), 0)
    policy = learned()
    stored = Policy(policy.scorer, policy.allocator, precision=4)
    module = distillation(model(folder), stored, objective=PolicyGradient(ForwardKL()))
    with pytest.raises(UserError, match="no precision, no evict_interval"):
        module.training_step(batch(), 0)
