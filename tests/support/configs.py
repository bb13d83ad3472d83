"""Configurations of tiny models of every family."""

from typing import Any

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # attention that is far from even, logits that differ
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}


def sizes(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
    }


EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOW = 24
LINEAR = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "beta_fast": 32.0, "beta_slow": 1.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **sizes(48, 3, 4, 2, 16)},
    "mistral": {"model_type": "mistral", "sliding_window": None, **sizes(32, 2, 8, 2, 8)},
    "mistral-window": {"model_type": "mistral", "sliding_window": 256, **sizes(32, 3, 4, 4, 8)},
    "qwen2": {"model_type": "qwen2", **sizes(56, 2, 14, 2, 8)},
    "qwen3": {"model_type": "qwen3", **sizes(32, 3, 4, 1, 16)},
    "phi3": {"model_type": "phi3", "sliding_window": None, **sizes(64, 2, 4, 4, 16)},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4, **EXPERTS, **sizes(32, 2, 4, 2, 8)},
    "qwen3-moe": {"model_type": "qwen3_moe", "num_experts": 4, **EXPERTS, **sizes(32, 2, 8, 2, 8)},
    "olmo2": {"model_type": "olmo2", **sizes(64, 2, 4, 2, 16)},
    "granite": {"model_type": "granite", "attention_multiplier": 0.3, **sizes(64, 3, 4, 2, 16)},
    "gemma3": {
        "model_type": "gemma3_text",
        "sliding_window": WINDOW,
        "layer_types": HYBRID,
        "query_pre_attn_scalar": 16,
        **sizes(32, 4, 4, 2, 16),
    },
    "gemma2": {
        "model_type": "gemma2",
        "sliding_window": WINDOW,
        "layer_types": HYBRID,
        "attn_logit_softcapping": 5.0,  # far below the logits
        **sizes(32, 4, 4, 2, 16),
    },
    "gpt-oss": {
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "sliding_window": WINDOW,
        "layer_types": HYBRID[1:],
        "rope_parameters": {**YARN, "original_max_position_embeddings": 256},
        **EXPERTS,
        **sizes(32, 3, 4, 2, 16),
    },
    "qwen3-next": {
        "model_type": "qwen3_next",
        "layer_types": LINEAR,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "initializer_range": 0.15,  # its gated norms amplify rounding
        **EXPERTS,
        **sizes(32, 4, 4, 2, 16),
    },
    "lfm2": {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, **sizes(32, 4, 4, 2, 8)},
    "falcon-h1": {
        "model_type": "falcon_h1",
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        **sizes(32, 2, 4, 2, 8),
    },
}
FAMILIES = list(CONFIGS)
HYBRIDS = ("gemma3", "gemma2", "gpt-oss")
"""Families with sliding layers."""
STATES = ("qwen3-next", "lfm2", "falcon-h1")
"""Hybrid models with states of linear attention, convolution or a state space, which padding within a row changes."""
