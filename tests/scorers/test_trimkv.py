"""Retention of tokens: the file's gates and trained ones, budgets of DBTrimKV, and how gates learn."""

import math

import pytest
import torch
from support.models import attached, tokens
from support.observations import observe, randomised
from support.tables import made_up
from torch import Tensor

from learnkv import Policy, load_model, load_policy, prefill
from learnkv.allocators import Flat, Threshold
from learnkv.calibration.retention import _Everything, retention_gates, retention_losses
from learnkv.calibration.trials import sample_trials
from learnkv.errors import UserError
from learnkv.formats import tensors
from learnkv.formats.files import TABLES
from learnkv.ops.retention_attention import retention_attention
from learnkv.scorers import TrimKV


def by_formula(weights: dict[str, Tensor], inputs: Tensor, positions: Tensor, length: int) -> Tensor:
    """Scores [H, S] of one row's tokens with inputs [S, E], in double precision."""
    weights = {name: part[1].double() for name, part in weights.items()}
    hidden = inputs.double() @ weights["in.weight"].T + weights["in.bias"]
    logits = (hidden * hidden.sigmoid()) @ weights["out.weight"].T + weights["out.bias"]
    return (length + 1 - positions.double()) * logits.sigmoid().log().T


def test_scores_of_a_file_are_those_of_the_formula() -> None:
    path, obs = made_up("retention", 2, 2, 3), observe([40])
    expected = by_formula(tensors.read(path, tensors.RETENTION), obs.hidden[0], obs.positions[0, 0], 40)
    scorer = TrimKV(path)
    torch.testing.assert_close(scorer(obs)[0].double(), expected, rtol=1e-4, atol=1e-5)
    sizes = obs.keys[0].double().norm(dim=-1).log()
    torch.testing.assert_close(TrimKV(path, key_norm=True)(obs)[0].double(), expected + sizes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads", ["hidden", "entries"])
def test_a_trained_network_reads_what_it_is_made_for(reads: str) -> None:
    scorer = TrimKV(num_layers=2, num_heads=2, head_dim=16, hidden_size=32, width=5, reads=reads)
    obs = observe([40])
    untrained = math.log(1 / (1 + math.exp(-10))) * (41 - obs.positions)
    torch.testing.assert_close(scorer(obs), untrained.float(), rtol=1e-3, atol=1e-7)
    scorer = randomised(scorer)
    weights = {name: scorer.gate[name.replace(".", "_")] for name in tensors.RETENTION}
    entries = torch.cat([obs.keys[0], obs.values[0]]).transpose(0, 1).flatten(1)
    inputs = obs.hidden[0] if reads == "hidden" else entries
    expected = by_formula(weights, inputs, obs.positions[0, 0], 40)
    torch.testing.assert_close(scorer(obs)[0].double(), expected, rtol=1e-4, atol=1e-4)


def test_a_gate_of_another_model_is_refused() -> None:
    policy = Policy(TrimKV(made_up("retention", 3, 4, 1, 16, 48)))
    with pytest.raises(UserError, match="made for 3 layers of 4 kv heads and 48 inputs, layer 0 of the model has 2"):
        prefill(attached("llama"), tokens(1, 40), policy=policy, keep=0.5)
    with pytest.raises(UserError, match="width=0"):
        TrimKV(width=0)


def test_gradients_reach_the_network_through_exact_budgets() -> None:
    scorer = TrimKV(num_layers=3, num_heads=2, hidden_size=48, width=5, bias=4.0)
    policy = Policy(scorer, Flat())
    cache = prefill(attached("llama"), tokens(1, 60), policies=[policy])
    student = policy.relax(cache, keep=0.3)
    assert int(student.budgets.sum()) == round(0.3 * 60 * 6)
    gates = torch.stack([layer.state.gates for layer in student.compressed_layers()])
    (gates * torch.randn(gates.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    assert all(bool(part.grad.abs().sum() > 0) for name, part in scorer.gate.items() if name.startswith("out"))


def scores_of(counts: list[list[int]], slots: int) -> Tensor:
    """Scores [L, 1, H, S] of which each head has so many ones, the last entries, and else values below zero."""
    scores = torch.full((len(counts), 1, len(counts[0]), slots), -1.0)
    for layer, heads in enumerate(counts):
        for head, count in enumerate(heads):
            scores[layer, 0, head, slots - count :] = 1 + torch.arange(count) / 100
    return scores


def test_a_floor_is_given_to_every_head_before_all_compete() -> None:
    scores, budget = scores_of([[8, 0], [4, 4]], 20), torch.tensor([8.0])
    assert Flat(floor=0.5)(scores, None, budget)[:, 0].tolist() == [[12, 4], [8, 8]]
    plain = Flat()(scores, None, torch.tensor([4.0]))
    assert plain[:, 0].tolist() == [[8, 0], [4, 4]]
    assert Flat(floor=1.0)(scores, None, budget)[:, 0].tolist() == [[8, 8], [8, 8]]
    with pytest.raises(UserError, match=r"floor=0.5 rounding=kvzip"):
        Flat("kvzip", 0.5)


def test_the_original_counts_a_heads_first_token_for_the_head_before() -> None:
    scores, budget = scores_of([[3, 2], [3, 4]], 20), torch.tensor([4.0])
    scores[1, 0, 0, 0] = 9.0  # the first token of the third head
    scores[1, 0, 0, 17] = -1.0
    repaired, original = (Flat(rounding, 0.25)(scores, None, budget)[:, 0] for rounding in ("exact", "trimkv"))
    assert repaired.tolist() == [[4, 3], [4, 5]]
    assert original.tolist() == [[4, 4], [3, 5]]


def test_a_threshold_counts_and_its_policy_spends_exactly_the_budget() -> None:
    scores = scores_of([[3, 0], [5, 20]], 20)
    assert Threshold(0.5)(scores, None, torch.tensor([4.0]))[:, 0].tolist() == [[3, 0], [5, 20]]
    assert Threshold(99.0)(scores, None, torch.tensor([4.0]))[:, 0].tolist() == [[1, 1], [1, 1]]
    policy = Policy(TrimKV(made_up("retention", 3, 2, 2, 16, 48)), Threshold(math.log(0.6)))
    small = prefill(attached("llama"), tokens(1, 60), policy=policy, keep=0.3)
    assert int(small.budgets.sum()) == round(0.3 * 60 * 6)


@pytest.mark.parametrize("on", ["weight", "logit"])
def test_attention_to_faded_entries_is_that_of_the_formula(on: str) -> None:
    generator = torch.Generator().manual_seed(0)
    queries, keys, values = (torch.randn(1, n, 9, 4, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    fading = -torch.rand(1, 2, 9, generator=generator, dtype=torch.float64)
    fading.requires_grad_()
    got = retention_attention(queries, keys, values, fading, 0.5, on=on)
    for head in range(4):
        for i in range(9):
            age = i - torch.arange(i + 1)
            beta = (age * fading[0, head // 2, : i + 1]).exp()
            z = 0.5 * keys[0, head // 2, : i + 1] @ queries[0, head, i]
            weights = z.exp() * beta / (z.exp() * beta).sum() if on == "weight" else (z * beta).softmax(-1)
            expected = weights @ values[0, head // 2, : i + 1]
            torch.testing.assert_close(got[0, head, i].double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.square().sum(), fading)
    assert bool((gradient[..., :-1] != 0).all())
    assert bool((gradient[..., -1] == 0).all())  # the last token has not faded yet


def test_gates_learn_and_the_shipped_ones_are_the_reference_models() -> None:
    model, tokenizer = load_model("reference")
    contexts = [trial.context for trial in sample_trials(tokenizer, 96, 2, seed=3)]
    start, learned = (retention_gates(model, contexts, 0.25, steps) for steps in (1, 25))
    layers = prefill(model, contexts[0], policies=[Policy(_Everything())]).compressed_layers()
    shipped = tensors.read(TABLES / "retention_gates.safetensors", tensors.RETENTION)
    assert {name: part.shape[0::2] for name, part in learned.items()} == {n: p.shape[0::2] for n, p in shipped.items()}
    with torch.no_grad():
        before, after = (
            sum(
                sum(retention_losses({n: p[index].float() for n, p in gates.items()}, layer.observation(), 0.25))
                for index, layer in enumerate(layers)
            )
            for gates in (start, learned)
        )
    assert after < 0.9 * before
    for name in ("trimkv", "dbtrimkv"):
        small = prefill(model, contexts[0], policy=load_policy(name), keep=0.25)
        assert small.spent == pytest.approx([0.25], abs=1e-3)
