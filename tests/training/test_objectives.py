"""Objectives: values against sums written out, gradients against autograd, and how a YAML names them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from learnkv.cli.parser import parse
from learnkv.core.plan import Plan
from learnkv.errors import UserError
from learnkv.ops.normal_scores import normal_scores
from learnkv.persistence.named_configs import CONFIGS
from learnkv.scorers import KVzip
from learnkv.training.config import TrainConfig
from learnkv.training.gumbel_noise import with_gumbel_noise
from learnkv.training.objectives import (
    BudgetRegression,
    Comparison,
    ForwardKL,
    HiddenMSE,
    Outputs,
    ReverseKL,
    ScoreRegression,
    Stages,
    WeightedSum,
)

SAMPLE, WEIGHTS = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([1.0, 3.0, 2.0, 0.0, 1.0])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def means(tokens: Tensor) -> Tensor:
    """Weighted means of the two prompts."""
    each = [(tokens[i == SAMPLE] * WEIGHTS[i == SAMPLE]).sum() / WEIGHTS[i == SAMPLE].sum() for i in (0, 1)]
    return torch.stack(each)


def comparison(teacher: Outputs, student: Outputs) -> Comparison:
    return Comparison(2, sample=SAMPLE, weights=WEIGHTS, teacher=teacher, student=student)


@pytest.mark.parametrize(
    ("kind", "temperature"), [(ForwardKL, 1.0), (ForwardKL, 2.0), (ReverseKL, 1.0), (ReverseKL, 2.0)]
)
def test_divergences_of_the_next_token(kind: type[Any], temperature: float) -> None:
    full, held = draw(5, 7).requires_grad_(), draw(5, 7, seed=1).requires_grad_()
    loss = kind(temperature)(comparison(Outputs(full), Outputs(held)))
    p, q = (full.detach() / temperature).softmax(-1), (held.detach() / temperature).softmax(-1)
    a, b = (p, q) if kind is ForwardKL else (q, p)
    kl = (a * (a / b).log()).sum(-1)
    torch.testing.assert_close(loss.detach(), means(kl) * temperature**2, rtol=1e-4, atol=1e-6)
    loss.sum().backward()
    assert full.grad is None
    share = WEIGHTS / torch.stack([WEIGHTS[i == SAMPLE].sum() for i in (0, 1)])[SAMPLE]
    slope = q - p if kind is ForwardKL else q * ((q / p).log() - kl.unsqueeze(-1))
    torch.testing.assert_close(held.grad, share.unsqueeze(-1) * slope * temperature, rtol=1e-4, atol=1e-6)


def test_large_losses_saturate() -> None:
    full, held = draw(5, 7), draw(5, 7, seed=1).requires_grad_()
    outputs = comparison(Outputs(full), Outputs(held))
    plain, small, large = (ForwardKL(saturation=limit)(outputs) for limit in (None, 0.05, 1e4))
    torch.testing.assert_close(small, 0.05 * (1 + plain / 0.05).log())
    torch.testing.assert_close(large, plain, rtol=1e-3, atol=0)
    slopes = [torch.autograd.grad(loss[0], held, retain_graph=True)[0] for loss in (plain, small)]
    torch.testing.assert_close(slopes[1], slopes[0] / (1 + plain[0].item() / 0.05))


@pytest.mark.parametrize("layers", ["last", "all"])
def test_distance_of_hidden_states_is_in_units_of_their_size(layers: str) -> None:
    full = tuple(draw(5, 6, seed=i).mul(10**i).requires_grad_() for i in range(3))
    held = tuple(
        (state.detach() + 0.1 * 10**i * draw(5, 6, seed=9 + i)).requires_grad_() for i, state in enumerate(full)
    )
    loss = HiddenMSE(layers)(comparison(Outputs(full[0], full), Outputs(held[0], held)))
    found = []
    for a, b in list(zip(full, held, strict=True))[2 if layers == "last" else 0 :]:
        size = torch.stack([a[i == SAMPLE].square().mean() for i in (0, 1)])
        found.append(means((a - b).square().mean(-1)) / size)
    torch.testing.assert_close(loss, torch.stack(found).mean(0))
    loss.sum().backward()
    assert all(state.grad is None for state in full)
    assert [state.grad is None for state in held] == [layers == "last"] * 2 + [False]
    size = full[2].detach()[:2].square().mean()
    slope = 2 * (held[2] - full[2]).detach()[:2] / 6 / size * torch.tensor([[0.25], [0.75]])
    torch.testing.assert_close(held[2].grad[:2], slope / (1 if layers == "last" else 3))
    nothing_left = tuple(torch.zeros_like(state) for state in full)
    even = replace(comparison(Outputs(full[0], full), Outputs(full[0], nothing_left)), weights=None)
    assert HiddenMSE(layers)(even).tolist() == pytest.approx([1.0, 1.0])


def planned(scores: Tensor, wanted: Tensor | None = None, budget: int = 2) -> Plan:
    layers, batch, heads, _ = scores.shape
    budgets = torch.full((layers, batch, heads), budget)
    wanted = budgets.double() if wanted is None else wanted
    return Plan(scores, wanted, budgets, torch.zeros(batch, dtype=torch.long), int(budgets.sum()), scores)


def test_scores_are_matched_where_they_decide() -> None:
    target = KVzip()
    scores = draw(2, 2, 2, 6)
    scores[:, :, :, 0], scores[:, 1, :, 5] = torch.inf, -torch.inf  # one protected, one absent
    scores.requires_grad_()
    wanted = draw(2, 2, 2, 6, seed=3).exp()
    wanted[:, 1, :, 5] = -torch.inf
    asked = scores.detach().isfinite()
    plan = replace(
        planned(scores), scores=torch.full_like(scores, torch.nan)
    )  # what sampling makes of them is not asked
    loss = ScoreRegression(target, of="scores")(Comparison(2, plan, {target: wanted}))
    rows = [(scores[:, row][asked[:, row]] - wanted[:, row][asked[:, row]]).square().mean() for row in (0, 1)]
    torch.testing.assert_close(loss, torch.stack(rows))
    loss.sum().backward()
    count = torch.tensor([5, 4]).view(1, 2, 1, 1) * 4
    slope = torch.where(asked, 2 * (scores.detach() - wanted) / count, 0.0)
    torch.testing.assert_close(scores.grad, slope)

    ranked = torch.stack([normal_scores(one, free) for one, free in zip(wanted, asked, strict=True)])
    same = torch.where(asked, ranked, scores.detach())
    of_ranks = ScoreRegression(target)
    for monotone in (wanted, wanted.log()):  # 0 for the same order, whatever the scale
        assert of_ranks(Comparison(2, planned(same), {target: monotone})).abs().max() < 1e-10
    apart = of_ranks(Comparison(2, planned(torch.where(asked, -ranked, same)), {target: wanted}))
    assert apart[0].item() == pytest.approx(4 * ranked[:, 0][asked[:, 0]].square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("of", ["logits", "probabilities"])
def test_scores_as_logits_or_chances_of_a_slower_scorers_chances(of: str) -> None:
    target = KVzip()
    scores = draw(2, 2, 2, 6)
    scores[:, 0, :, 0], scores[:, 1, :, :2] = torch.inf, -torch.inf
    chances = draw(2, 2, 2, 6, seed=3).sigmoid()
    chances[:, 1, :, :2] = -torch.inf
    asked = scores.isfinite()
    scores.requires_grad_()
    given = scores if of == "logits" else scores.sigmoid().masked_fill(~asked, torch.inf)
    loss = ScoreRegression(target, of=of)(Comparison(2, planned(given), {target: chances}))
    rows = []
    for row in (0, 1):
        p, q = chances[:, row][asked[:, row]], scores.detach()[:, row][asked[:, row]].sigmoid()
        rows.append(-(p * q.log() + (1 - p) * (1 - q).log()).mean())
    torch.testing.assert_close(loss.detach(), torch.stack(rows))
    loss.sum().backward()
    count = torch.tensor([5, 4]).view(1, 2, 1, 1) * 4
    torch.testing.assert_close(scores.grad, torch.where(asked, (scores.detach().sigmoid() - chances) / count, 0.0))


def test_scores_that_are_no_chances_are_refused_as_chances() -> None:
    target = KVzip()
    for scores in (3 * draw(1, 1, 1, 6), torch.zeros(1, 1, 1, 6)):
        with pytest.raises(UserError, match=r"^objective: of=probabilities expects scores above 0 and up to 1"):
            ScoreRegression(target, of="probabilities")(Comparison(1, planned(scores), {target: draw(1, 1, 1, 6)}))


def test_stages_follow_each_other_by_optimiser_steps() -> None:
    first, second, last = ScoreRegression(KVzip()), BudgetRegression(KVzip()), ForwardKL()
    stages = Stages([first, Stages([second, last], [3])], [2])
    assert [stages.at_step(step) for step in (0, 1, 2, 3, 99)] == [first, first, second, last, last]
    assert ForwardKL().at_step(7).name == "kl"
    for steps in ([], [0], [1, 1]):
        with pytest.raises(UserError, match="steps"):
            Stages([first, last], steps)


def test_budgets_are_matched_to_one_ranking_of_all_heads() -> None:
    target = KVzip()
    scores = torch.zeros(2, 1, 2, 4)
    scores[..., 0] = torch.inf
    wanted = torch.tensor([[[2.0, 2.0]], [[2.0, 2.0]]], dtype=torch.float64, requires_grad=True)
    asked = torch.zeros(2, 1, 2, 4)
    asked[0, 0, 0] = torch.tensor([0.0, 9.0, 8.0, 7.0])  # of 8 slots 4 are protected; 3 of the rest are here, 1 there
    asked[1, 0, 1] = torch.tensor([0.0, 6.0, 1.0, 1.0])
    loss = BudgetRegression(target)(Comparison(1, planned(scores, wanted), {target: asked}))
    share = torch.tensor([4.0, 1.0, 1.0, 2.0]) / 8
    assert loss.item() == pytest.approx(float((share * (share / 0.25).log()).sum()), rel=1e-5)
    loss.sum().backward()
    torch.testing.assert_close(wanted.grad.flatten().float(), -share / 2 + 1 / 8)


def test_a_sum_adds_what_its_parts_say_and_asks_for_what_they_need() -> None:
    full, held = draw(5, 7), draw(5, 7, seed=1)
    seen = comparison(Outputs(full, (full,)), Outputs(held, (held,)))
    both = WeightedSum([ForwardKL(), HiddenMSE()], [2.0, 0.5])
    torch.testing.assert_close(both(seen), 2 * ForwardKL()(seen) + 0.5 * HiddenMSE()(seen))
    assert (both.reads, both.hidden, both.plans, both.targets) == (True, True, False, ())
    target = KVzip()
    slow = WeightedSum([ScoreRegression(target), BudgetRegression(target)], [1.0, 1.0])
    assert (slow.reads, slow.hidden, slow.plans, set(slow.targets)) == (False, False, True, {target})
    for weights in ([1.0], [1.0, 0.0]):
        with pytest.raises(UserError, match="weights"):
            WeightedSum([ForwardKL(), HiddenMSE()], weights)


def test_noise_makes_a_sample_by_scores_and_leaves_the_protected_alone() -> None:
    scores = torch.tensor([torch.inf, 2.0, 1.0, 0.0, -torch.inf]).expand(1, 1, 4000, 5).clone().requires_grad_()
    found = with_gumbel_noise(planned(scores, budget=2), 0.5, seed=1).scores
    assert torch.equal(found.isfinite(), scores.isfinite())
    assert torch.equal(found[..., 0], scores[..., 0])
    assert torch.equal(found, with_gumbel_noise(planned(scores, budget=2), 0.5, seed=1).scores)
    assert not torch.equal(found, with_gumbel_noise(planned(scores, budget=2), 0.5, seed=2).scores)
    assert ((found - scores)[..., 1:4].mean() / 0.5).item() == pytest.approx(0.5772, abs=0.03)  # Euler's constant
    first = found[..., 1:4].argmax(-1).flatten().bincount() / 4000
    torch.testing.assert_close(first, torch.tensor([4.0, 2.0, 0.0]).softmax(-1), atol=0.02, rtol=0)
    found[..., 1:4].sum().backward()
    assert scores.grad[..., 1:4].eq(1).all()


KVZIP = {"class_path": "learnkv.scorers.KVzip", "init_args": {"normalized": True, "log": True}}
NAMED = {
    "ForwardKL": {"temperature": 2.0, "saturation": 0.1},
    "ReverseKL": {"temperature": 1.0},
    "HiddenMSE": {"layers": "all"},
    "ScoreRegression": {"target": KVZIP, "of": "scores"},
    "BudgetRegression": {"target": KVZIP},
}


@pytest.mark.parametrize("name", [*NAMED, "WeightedSum"])
def test_a_yaml_names_an_objective(name: str, tmp_path: Path) -> None:
    parts = [{"class_path": f"learnkv.training.objectives.{one}", "init_args": NAMED[one]} for one in NAMED]
    arguments = NAMED.get(name, {"objectives": parts, "weights": [1.0, 2.0, 3.0, 4.0, 5.0]})
    typed = {"objective": {"class_path": f"learnkv.training.objectives.{name}", "init_args": arguments}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(typed))
    config, resolved = parse(TrainConfig, ["config=quickstart", f"config={tmp_path / 'one.yaml'}"], "train")
    assert type(config.distillation.objective).__name__ == name
    made = config.distillation.objective.spec()
    if name == "WeightedSum":
        assert [type(one).__name__ for one in config.distillation.objective.objectives] == list(NAMED)
        assert made["weights"] == arguments["weights"]
    elif "target" in arguments:
        assert made["target"]["init_args"]["log"] is True
    else:
        assert made == arguments
    assert yaml.safe_load(resolved)["objective"]["class_path"].endswith(name)


YAMLS = {path.stem for path in (CONFIGS / "train").glob("*.yaml")} - {"reference"}  # that one trains the model itself


@pytest.mark.parametrize("name", sorted(YAMLS))
def test_every_yaml_for_training_is_read(name: str) -> None:
    config, _ = parse(TrainConfig, [f"config={name}"], "train")
    assert any(True for _ in config.policy.parameters())
    assert config.trainer["max_steps"] > 0


HERE = "learnkv.training.objectives"


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["temperature=0,0.5"], "temperature=0,0.5"),
        (["gumbel_noise=-1"], "gumbel_noise=-1"),
        (["keep_sampling=sandwich", "students=1"], "students=1"),
        (["keep_sampling=sandwitch"], "keep_sampling=sandwitch"),
        (
            [f"objective.class_path={HERE}.ScoreRegression", f"objective.init_args.target={KVZIP}", "lora.rank=2"],
            "learns",
        ),
        ([f"objective.class_path={HERE}.ForwardKL", "objective.init_args.temperature=0"], "temperature=0: expected"),
        ([f"objective.class_path={HERE}.ForwardKL", "objective.init_args.saturation=0"], "saturation=0: expected"),
        ([f"objective.class_path={HERE}.Forward"], "objective"),
    ],
)
def test_draws_that_cannot_be_are_refused(typed: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        parse(TrainConfig, ["config=quickstart", *typed], "train")
