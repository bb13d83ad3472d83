"""Distillation on a tiny model: where it starts, that it learns, what it draws, what it stores."""

from pathlib import Path

import pytest
import torch
from support.training import batch, distillation, learned, mean_kl, moved
from transformers import PreTrainedModel

from learnkv.core.adapter import Adapter
from learnkv.errors import RunError, UserError
from learnkv.inference import lora as adapters
from learnkv.inference.models import load_model
from learnkv.inference.prefill import prefill, score_prompt
from learnkv.ops.normal_scores import normal_scores
from learnkv.policy.policy import Policy
from learnkv.scorers import KVzip, SnapKV
from learnkv.training.data.batches import Batch
from learnkv.training.module import Distillation
from learnkv.training.objectives import (
    BudgetRegression,
    ForwardKL,
    HiddenMSE,
    ReverseKL,
    ScoreRegression,
    Stages,
    WeightedSum,
)
from learnkv.training.objectives.base import Objective
from learnkv.training.settings import DistillationSettings, Lora


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return load_model(str(folder))[0]


@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_loss_is_the_kl_of_the_deployed_policy(model: PreTrainedModel, number: int) -> None:
    """Hard forward: what is trained is what is shipped, at the start and anywhere else."""
    policy, one = moved(number), batch(number)
    loss = distillation(model, policy).training_step(one, 0)
    kl = mean_kl(model, one, lambda cache: policy.compress(cache, keep=0.2))
    assert loss.item() == pytest.approx(kl, rel=1e-3)
    assert loss.item() > 1e-3


def test_training_lowers_the_kl_of_the_deployed_policy(model: PreTrainedModel) -> None:
    policy = learned()
    module = distillation(model, policy, lr=1e-2, budget_lr=0.2)
    batches = [batch(number) for number in range(3)]

    def kl() -> float:
        with torch.no_grad():
            return sum(float(module.training_step(one, 0)) for one in batches)

    before, optimizer = kl(), module.configure_optimizers()["optimizer"]
    for _ in range(12):
        for one in batches:
            optimizer.zero_grad()
            module.training_step(one, 0).backward()
            optimizer.step()
    assert kl() < 0.93 * before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_budget_logits_have_a_rate_of_their_own(model: PreTrainedModel) -> None:
    module = distillation(model, learned(), lr=1e-3, budget_lr=0.2)
    budgets, networks = module.configure_optimizers()["optimizer"].param_groups
    assert {tuple(p.shape) for p in budgets["params"]} == {(6, 2, 2), (6, 2)}
    assert sum(p.numel() for p in networks["params"]) == 4 * (21 * 4 + 4 + 4 + 21)
    assert (budgets["initial_lr"], networks["initial_lr"]) == (0.2, 1e-3)
    rates = [module._rate(step) for step in range(31)]
    assert max(rates) == pytest.approx(1.0, abs=0.01)
    assert rates[-1] == pytest.approx(0.1)


def test_kept_fractions_are_functions_of_seed_and_batch(model: PreTrainedModel) -> None:
    module = distillation(model, learned(), keep=(), keep_range=(0.1, 0.4), students=2)
    assert module.keeps(7) == module.keeps(7)
    assert module.keeps(7) != module.keeps(8)
    assert all(0.1 <= low <= 0.2 <= high <= 0.4 for low, high in map(module.keeps, range(20)))
    listed = distillation(model, learned(), keep=(0.1, 0.3), students=3)
    assert {keep for number in range(20) for keep in listed.keeps(number)} == {0.1, 0.3}


def test_a_sandwich_has_the_lowest_the_highest_and_others_between(model: PreTrainedModel) -> None:
    module = distillation(model, learned(), keep=(), keep_range=(0.1, 0.4), students=4, keep_sampling="sandwich")
    found = [module.keeps(number) for number in range(20)]
    assert {(one[0], one[-1]) for one in found} == {(0.1, 0.4)}
    between = [keep for one in found for keep in one[1:-1]]
    assert len(set(between)) == 40
    assert 0.1 < min(between) < 0.13 < 0.3 < max(between) < 0.4
    assert module.keeps(7) == found[7]
    listed = distillation(model, learned(), keep=(0.3, 0.1, 0.2), students=3, keep_sampling="sandwich")
    assert {tuple(listed.keeps(number)) for number in range(20)} == {(0.1, keep, 0.3) for keep in (0.1, 0.2, 0.3)}


def test_the_temperature_falls_evenly_in_its_logarithm(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    module = distillation(model, learned(), temperature=(0.5, 0.125), steps=5)
    steps = iter(range(6))
    monkeypatch.setattr(Distillation, "global_step", property(lambda self: next(steps)))
    found = [module.temperature for _ in range(6)]
    assert found == pytest.approx([0.5, 0.5 * 2**-0.5, 0.25, 0.25 * 2**-0.5, 0.125, 0.125])


@pytest.mark.parametrize(
    "objective",
    [
        ReverseKL(),
        HiddenMSE("all"),
        ScoreRegression(KVzip()),
        WeightedSum([ForwardKL(), BudgetRegression(KVzip())], [1, 1]),
    ],
)
def test_every_objective_trains_the_policy_and_is_a_mean_over_prompts(
    model: PreTrainedModel, objective: Objective
) -> None:
    one, policy = batch(1), moved(1)
    loss = distillation(model, policy, objective=objective).training_step(one, 0)
    loss.backward()
    touched = {name: parameter.grad.abs().max() > 0 for name, parameter in policy.named_parameters()}
    assert touched.pop("scorer.weight_out")
    assert all(touched[name] for name in touched if name.startswith("scorer.") or objective.reads)
    assert all(touched.values()) == objective.reads  # scores know nothing of budgets
    halves = []
    for row in range(2):
        parts = [held.chunk(2)[row] for held in one[1:6]]
        halves.append(distillation(model, policy, objective=objective).training_step(Batch(one.number, *parts), 0))
    assert loss.item() == pytest.approx(torch.stack(halves).mean().item(), rel=1e-4)


def test_scores_of_a_slower_scorer_are_what_regression_learns(model: PreTrainedModel) -> None:
    policy, target, one = learned(), KVzip(), batch(1)
    module = distillation(model, policy, objective=ScoreRegression(target), lr=2e-2)
    optimizer, losses = module.configure_optimizers()["optimizer"], []
    for _ in range(25):
        optimizer.zero_grad()
        losses.append(module.training_step(one, 0))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    cache = prefill(model, one.prompts, one.prompt_mask, policies=[policy, Policy(target)])
    scores, wanted = policy.plan(cache, keep=0.2).scores, score_prompt(model, target, one.prompts, one.prompt_mask)
    asked = scores.isfinite()
    ranks = torch.stack([normal_scores(held, free) for held, free in zip(wanted, asked, strict=True)])
    apart = torch.where(asked, scores - ranks, 0.0).square().sum((0, 2, 3)) / asked.sum((0, 2, 3))
    assert module.training_step(one, 0).item() == pytest.approx(apart.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("objective", "plans"), [(ScoreRegression(KVzip()), 1), (BudgetRegression(KVzip()), 3)])
def test_what_no_budget_changes_is_planned_once(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, objective: Objective, plans: int
) -> None:
    keeps, plan = [], Policy.plan
    monkeypatch.setattr(Policy, "plan", lambda self, cache, keep: keeps.append(keep) or plan(self, cache, keep))
    distillation(model, learned(), objective=objective, keep=(), students=3).training_step(batch(1), 0)
    assert len(set(keeps)) == len(keeps) == plans


def test_stages_change_what_a_step_minimises(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Stages([ScoreRegression(KVzip()), ForwardKL()], [2])
    module = distillation(model, learned(), objective=stages)
    told = []
    module.log = lambda name, value, **keys: told.append(name)
    for step in range(4):
        monkeypatch.setattr(Distillation, "global_step", step)
        module.training_step(batch(1), step)
    assert told == ["train/score_distance"] * 2 + ["train/kl", "train/spent_over_asked"] * 2


def test_an_adapter_starts_as_nothing_and_trains_beside_the_policy(folder: Path) -> None:
    model, policy = load_model(str(folder))[0], learned()
    before = [distillation(model, policy).training_step(batch(number), 0) for number in range(2)]
    policy.adapter = Adapter(2, 4.0, ("q_proj", "o_proj"))
    adapters.add(model, policy.adapter)
    module = distillation(model, policy, lr=1e-30, budget_lr=1e-30, lora=Lora(lr=2e-2))
    assert [module.training_step(batch(number), 0) for number in range(2)] == before
    optimizer = module.configure_optimizers()["optimizer"]
    cache = prefill(model, batch().prompts, batch().prompt_mask)
    teacher = module._logits(cache.fork(), batch()).detach()
    for _ in range(12):
        optimizer.zero_grad()
        loss = torch.stack([module.training_step(batch(number), 0) for number in range(2)])
        loss.mean().backward()
        optimizer.step()
    assert loss.mean() < 0.9 * torch.stack(before).mean()
    assert torch.equal(module._logits(cache.fork(), batch()), teacher)  # the full cache is read by the bare model
    trained = [name for name, weight in model.named_parameters() if weight.grad is not None]
    assert trained == [name for name, _ in model.named_parameters() if adapters.in_training(name)]


def test_noise_changes_what_one_student_keeps(model: PreTrainedModel) -> None:
    keys = {"keep": (), "keep_range": (0.1, 0.4), "students": 3, "keep_sampling": "sandwich"}
    losses = [distillation(model, learned(), gumbel_noise=one, **keys).training_step(batch(1), 0) for one in (0, 1, 1)]
    assert losses[1] != losses[0]
    assert losses[1] == losses[2]


def test_context_weights_change_the_loss_and_not_its_minimum(model: PreTrainedModel) -> None:
    one = batch(1)
    even, weighted = (
        distillation(model, learned(), weights=weights).training_step(one, 0) for weights in ("uniform", "context")
    )
    assert not torch.isclose(even, weighted)
    whole = distillation(model, learned(), weights="context", keep=(1.0,)).training_step(one, 0)
    assert abs(whole.item()) < 1e-5


def test_a_model_that_says_nan_ends_the_run(folder: Path) -> None:
    broken = load_model(str(folder))[0]
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RunError, match="step 0"):
        distillation(broken, learned()).training_step(batch(), 0)


def test_a_heuristic_alone_has_nothing_to_train(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="nothing to train"):
        Distillation(model, Policy(SnapKV()), DistillationSettings(), steps=1)


def test_checkpoints_hold_the_policy_and_not_the_model(model: PreTrainedModel) -> None:
    module = Distillation(model, learned(), DistillationSettings(), steps=1, description={"format_version": 1})
    checkpoint = {"state_dict": module.state_dict()}
    assert any(name.startswith("model.") for name in checkpoint["state_dict"])
    module.on_save_checkpoint(checkpoint)
    assert sorted(checkpoint["state_dict"]) == sorted(f"policy.{name}" for name in module.policy.state_dict())
    assert checkpoint["learnkv"] == {"format_version": 1, "budgets": None, "marginal": None, "adapter": None}
