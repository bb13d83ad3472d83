"""Which families of models work: every causal language model of transformers that can be built small, tried.

`python -m tools.families --write` writes `docs/families.md`; tests/test_families.py compares numbers.
"""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from learnkv import Policy, attach, continuation, prefill
from learnkv.errors import UserError
from learnkv.scorers import CriticalKV, ExpectedAttention, SnapKV

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
NAMES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LAYERS, WINDOW, PROMPT = 4, 24, 40
LARGEST = 30_000_000  # parameters of a model that is built
COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.25,  # attention that is far from even
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "attention_dropout": 0.0,
}
LATENT = {
    "head_dim": None,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": LAYERS,
}
INDEXER = {"index_n_heads": 2, "index_head_dim": 16}
SHARED = {
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "global_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT,
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "beam": {"n_group": 1, "topk_group": 1},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT | INDEXER,
    "dots3_note_text": LATENT,
    "dots1": {"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "falcon": {"head_dim": None},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": SHARED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "gemma4_text": SHARED | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT | INDEXER,
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": LATENT | {"num_layers": 2},
    "minicpm3": LATENT,
    "youtu": LATENT,
    "llama4_text": {"attention_chunk_size": WINDOW, "no_rope_layers": [1, 1, 1, 0]},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "zaya": {"num_experts_per_tok": 1},
}
POLICIES: dict[str, Callable[[], Policy]] = {
    "evicts": lambda: Policy(SnapKV(window=8)),
    "rotation": lambda: Policy(ExpectedAttention(future=16, covariance=False), rerotate="start"),
    "projection": lambda: Policy(CriticalKV(SnapKV(window=8))),
}
HEAD = """# Model families

Every causal language model of transformers {version} that can be built with a few layers and random weights was tried:
what learnkv computes is what transformers computes, or the family is refused in one line. Rotated keys are needed by
ExpectedAttention, TriAttention and `rerotate`, the output projection by CriticalKV, DefensiveKV, ReST-KV and KVzip+.
`yes` means equal numbers: a prompt read whole or in chunks, its continuation and generation, entries evicted or masked.
{supported} of {built} families are supported. The page is written by `python -m tools.families --write`.

"""


class Family(NamedTuple):
    """What a family can do; an empty reason: it can."""

    name: str
    refused: str
    """Why it cannot be read, or built."""
    rotation: str = ""
    """Why keys before rotation are not known."""
    projection: str = ""
    """Why its output projection is not."""
    built: bool = True

    @property
    def supported(self) -> bool:
        return not self.refused


def config_of(name: str) -> PretrainedConfig:
    """A small configuration; hybrid models get a window that prompts exceed."""
    settings = COMMON | {"sliding_window": WINDOW} | OVERRIDES.get(name, {})
    config = _configured(name, settings)
    if len(set(getattr(config, "layer_types", None) or ())) > 1 or config.get_text_config() is not config:
        return config
    return _configured(name, settings | {"sliding_window": 4096})


def _configured(name: str, settings: dict[str, Any]) -> PretrainedConfig:
    return AutoConfig.for_model(
        name, **{key: value for key, value in settings.items() if value is not None or "token" in key}
    )


def build(name: str) -> PreTrainedModel:
    """A small model, the same at every call; raises whatever transformers raises."""
    config = config_of(name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    parameters = sum(weight.numel() for weight in empty.parameters())
    if parameters > LARGEST:
        raise ValueError(f"has {parameters // 1_000_000} million parameters where it is smallest")
    implementation = "sdpa" if empty._supports_sdpa else "eager"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        for parameter, weight in model.named_parameters():
            if "norm" in parameter:  # norms that are not the identity
                nn.init.normal_(weight, float(weight.detach().mean()), 0.1)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def prompt(length: int = PROMPT) -> Tensor:
    """Token ids [1, T]."""
    return torch.randint(2, 97, (1, length), generator=torch.Generator().manual_seed(0))


@functools.cache
def tried(name: str) -> Family:
    """What the family can do."""
    try:
        with torch.no_grad():
            (model := build(name))(prompt())
    except Exception as error:  # transformers' own, of many kinds
        return Family(name, f"not built: {_first_line(error)}", built=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reasons = {}
        for part, policy in POLICIES.items():
            try:
                cache = prefill(attach(model), prompt(), policies=[policy()], chunk_size=13)
                continuation(model, prompt(6), policy().compress(cache, keep=0.5))
                reasons[part] = ""
            except UserError as error:
                reasons[part] = _first_line(error)
            if part == "evicts" and reasons[part]:
                return Family(name, reasons[part])
    return Family(name, "", reasons["rotation"], reasons["projection"])


def by_name(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a module's forward pass by name."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def page() -> str:
    """The Markdown of the page."""
    families = [tried(name) for name in NAMES]
    built = [family for family in families if family.built]
    other = [family.name for family in built if "found 0 attention layers" in family.refused]
    left = [family.name for family in families if not family.built]
    rows = [_row(family) for family in built if family.name not in other]
    table = ["| family | supported | rotated keys | output projection |", "|---|---|---|---|", *rows]
    supported = sum(family.supported for family in built)
    return (
        HEAD.format(version=transformers.__version__, built=len(built), supported=supported)
        + "\n".join(table)
        + "\n\nRefused, as their attention has no `layer_idx`, or no output projection `o_proj` or `out_proj`: "
        + f"{', '.join(other)}.\n"
        + f"\nNot tried, as they cannot be built small from these settings: {', '.join(left)}.\n"
    )


def _row(family: Family) -> str:
    cells = [family.name, _cell(family.refused)]
    cells += [_cell(reason) if family.supported else "" for reason in (family.rotation, family.projection)]
    return f"| {' | '.join(cells)} |"


def _cell(reason: str) -> str:
    return f"no: {reason}" if reason else "yes"


def _first_line(error: Exception) -> str:
    return " ".join((str(error).strip() or type(error).__name__).split())[:200]


if __name__ == "__main__":
    logging.set_verbosity(50)
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        for name in NAMES:
            print(*tried(name), sep=" | ", flush=True)
