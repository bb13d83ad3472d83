"""Passes in which a model does not read the compressed cache are refused in one line."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import attached, build, plain, tokens
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from learnkv import attach, continuation, detach, generate, load_policy, prefill
from learnkv.errors import UserError

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("other", ["sdpa", "eager"])
def test_an_attention_that_is_set_after_attach(other: Any) -> None:
    model = attach(build("llama"))
    cache = load_policy("snapkv").compress(prefill(model, tokens(1, 30)), keep=0.5)
    model.set_attn_implementation(other)
    for call in (
        lambda: prefill(model, tokens(1, 30)),
        lambda: continuation(model, tokens(1, 3), cache.fork()),
        lambda: generate(model, tokens(1, 3), cache.fork(), max_new_tokens=2),
    ):
        with pytest.raises(UserError, match=rf"llama: its attention was set to '{other}' after attach"):
            call()
    expected = continuation(attached("llama"), tokens(1, 3), cache.fork())
    assert torch.equal(continuation(attach(detach(model)), tokens(1, 3), cache), expected)


def test_gradient_checkpointing_while_training() -> None:
    model = attach(build("llama"))
    cache = prefill(model, tokens(1, 30))
    model.gradient_checkpointing_enable()
    before = continuation(model, tokens(1, 3), cache.fork())  # evaluation mode: nothing is dropped
    model.train()
    with pytest.raises(UserError, match="llama: gradient checkpointing drops the cache while training"):
        continuation(model, tokens(1, 3), cache.fork())
    model.gradient_checkpointing_disable()
    assert torch.equal(continuation(model, tokens(1, 3), cache), before)


def test_dropout_while_training() -> None:
    model = attach(build("llama", attention_dropout=0.5))
    cache = prefill(model, tokens(1, 30))
    model.train()
    for call in (lambda: prefill(model, tokens(1, 30)), lambda: continuation(model, tokens(1, 3), cache)):
        with pytest.raises(UserError, match=r"LlamaAttention drops out 0.5 of its attention: call model.eval\(\)"):
            call()


def test_a_layer_that_is_skipped() -> None:
    model = attach(build("llama"))
    cache = prefill(model, tokens(1, 30))
    attention = model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (torch.zeros_like(hidden_states), None)
    for call in (lambda: prefill(model, tokens(1, 9)), lambda: continuation(model, tokens(1, 3), cache)):
        with pytest.raises(
            UserError, match="llama: 1 of 3 attention layers did not read the compressed cache, first layer 1"
        ):
            call()


def test_a_layer_with_an_attention_of_its_own() -> None:
    class Own(LlamaAttention):
        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return self.o_proj(self.q_proj(hidden_states)), None

    class Changed(LlamaAttention):
        def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
            return super().forward(2 * hidden_states, **kwargs)

    model = build("llama")
    model.model.layers[0].self_attn.__class__ = Changed
    attach(model)
    assert continuation(model, tokens(1, 3), prefill(model, tokens(1, 9))).isfinite().all()

    class Without(torch.nn.Module):
        forward = Own.forward

    stranger: Any = Without()
    stranger.layer_idx, stranger.o_proj, stranger.q_proj = 0, torch.nn.Identity(), torch.nn.Identity()
    model = build("llama")
    model.model.layers[0].self_attn = stranger
    with pytest.raises(UserError, match="llama: Without does not use transformers' attention interface"):
        attach(model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_attend_twice_or_to_other_keys() -> None:
    def twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward(self, *args, **{**kwargs, "past_key_values": None})
        return forward(self, *args, **kwargs)

    forward = LlamaAttention.forward
    diff = AutoConfig.for_model("diffllama", **SMALL, num_key_value_heads=2, head_dim=8)
    latent = AutoConfig.for_model("deepseek_v3", **SMALL, **LATENT)
    for config, word in ((diff, "DiffLlamaAttention"), (latent, "DeepseekV3Attention|deepseek_v3")):
        with pytest.raises(UserError, match=word):
            prefill(AutoModelForCausalLM.from_config(config).eval(), tokens(1, 12))
    with pytest.raises(UserError, match="gemma4_text: layers that share keys and values"):
        attach(AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma4_text", **SMALL, **SHARED)).eval())


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
}
SHARED = {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "sliding_window": 6,
    "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}


@pytest.mark.parametrize("where", ["generation_config", "config"])
def test_a_config_that_turns_the_cache_off(where: Any, tmp_path: Path) -> None:
    model = build("llama", use_cache=False) if where == "config" else build("llama")
    model.generation_config.use_cache = False
    attach(model)
    ids, question = tokens(1, 30), tokens(1, 4)
    both = torch.cat([ids, question], 1)
    for settings in ({}, {"num_beams": 3}):
        expected = plain("llama").generate(both, max_new_tokens=6, do_sample=False, **settings)[:, 34:]
        assert torch.equal(generate(model, question, prefill(model, ids), max_new_tokens=6, **settings), expected)
        with pytest.raises(UserError, match="llama: its generation config sets use_cache=False"):
            model.generate(both, past_key_values=prefill(model, ids), max_new_tokens=6, do_sample=False)
    own = model.generate(both, past_key_values=prefill(model, ids), use_cache=True, max_new_tokens=6, do_sample=False)
    assert torch.equal(own[:, 34:], plain("llama").generate(both, max_new_tokens=6, do_sample=False)[:, 34:])
    assert model.generate(both, max_new_tokens=6, do_sample=False).shape == (1, 40)  # without a cache, as before


def test_attached_models_are_copied_and_pickled() -> None:
    model = attach(build("llama"))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.prepare_inputs_for_generation.model is twin
        cache = prefill(twin, tokens(1, 22)[:, :20])
        assert twin.generate(tokens(1, 22), past_key_values=cache, max_new_tokens=2).shape == (1, 24)
        assert "prepare_inputs_for_generation" not in vars(detach(twin))
