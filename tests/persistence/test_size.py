"""How large the policy named `learned` is beside models of 3 million and of 8 billion parameters."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from learnkv.inference.models import REFERENCE, describe_model
from learnkv.persistence.policies import build_policy, fill_sizes, parameter_share

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "train" / "learned.yaml"
LLAMA = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
QWEN = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


@pytest.mark.parametrize(
    ("config", "parameters", "at_most"),
    [
        (LLAMA, 8_030_261_248, 0.001),  # Llama-3.1-8B
        (QWEN, 8_190_735_360, 0.001),  # Qwen3-8B
        (LlamaConfig.from_pretrained(REFERENCE), 3_048_000, 0.03),
    ],
    ids=["llama", "qwen", "reference"],
)
def test_the_learned_policy_is_small(config: LlamaConfig, parameters: int, at_most: float) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        spec = build_policy(yaml.safe_load(CONFIG.read_text())["policy"]["init_args"]).spec()
        policy = build_policy(fill_sizes(spec, describe_model(model)["shapes"]))
    assert sum(one.numel() for one in model.parameters()) == pytest.approx(parameters, rel=0.01)
    assert 0.2 * at_most < parameter_share(policy, model) <= at_most
    assert parameter_share(policy, model) == pytest.approx(
        sum(map(torch.numel, policy.parameters())) / parameters, 0.01
    )
