"""A training step costs few prefills, ever fewer for longer prompts, and as many as its formula says."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks import training_cost
from learnkv import Policy
from learnkv.allocators import Uniform
from learnkv.scorers import KVzip, LearnedScorer, SnapKV
from learnkv.training.objectives import ScoreRegression


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_a_step_costs_what_its_formula_says_and_ever_less_for_longer_prompts(model: PreTrainedModel) -> None:
    ratios = []
    for prompt in (256, 640):
        policy = training_cost.on_snapkv(model)
        counted, computed = (how(model, policy, prompt, 16) for how in (training_cost.step, training_cost.computed))
        assert counted["prefill"] == computed["prefill"]
        assert computed["step over prefill"] == pytest.approx(counted["step over prefill"], rel=0.06)
        assert counted["step over prefill"] <= counted["bound"]
        ratios.append(counted["step over prefill"])
    assert ratios[1] < 0.6 * ratios[0]


def test_reading_a_prompt_is_counted_by_the_pairs_that_are_read(model: PreTrainedModel) -> None:
    layers, width, hidden, ffn, prompt = 2, 64, 256, 1024, 100
    linear = layers * (hidden * (2 * width + 2 * width // 2) + 3 * hidden * ffn)
    attention = layers * 4 * width * prompt * (prompt + 1) // 2
    found = training_cost.step(model, training_cost.on_snapkv(model), prompt, 8)["prefill"]
    assert found == 2 * linear * prompt + attention + 2 * 128 * hidden  # and one token's logits


def test_a_regression_step_contains_the_second_reading_of_its_target(model: PreTrainedModel) -> None:
    layers, width, hidden, ffn, prompt = 2, 64, 256, 1024, 100
    policy = Policy(LearnedScorer(SnapKV(window=8), layers, 2, 16), Uniform()).requires_grad_(True)
    linear = layers * (hidden * (2 * width + 2 * width // 2) + 3 * hidden * ffn)
    pairs = prompt * prompt + prompt * (prompt + 1) // 2
    columns = 2 * prompt * prompt  # logits of the pass once more, which the fused attention does not hand out
    again = 2 * linear * prompt + layers * width * (4 * pairs + 2 * columns) + 2 * 128 * hidden
    ids = torch.randint(3, 100, (1, prompt))
    reading, _, _, both = training_cost._read(model, policy, ids)
    found = training_cost.regression(model, policy, ScoreRegression(KVzip(chunk=256)), prompt)
    assert found["prefill"] == reading
    assert found["step over prefill"] * reading == pytest.approx(reading + again + both, rel=1e-9)
