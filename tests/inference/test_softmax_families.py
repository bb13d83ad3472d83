"""Gemma 2's soft-capped logits and gpt-oss's attention sinks, through prompts, training and stored caches."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import FAMILIES
from support.models import assert_logits_close, attached, build, kept, padded, plain, tokens
from torch import Tensor
from transformers import PreTrainedModel

from learnkv import Policy, attach, continuation, load_cache, load_policy, prefill, save_cache
from learnkv.errors import UserError
from learnkv.inference.layer_softmax import softmax_terms
from learnkv.pages import DELTA, Quest
from learnkv.residuals import Moments
from learnkv.scorers import KVzip, SnapKV

pytestmark = pytest.mark.compat
ALL_FULL = {"layer_types": ["full_attention"] * 2, "num_hidden_layers": 2}
every_family = pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def dense(family: str, **changes: Any) -> PreTrainedModel:
    """The untouched model, without sliding layers."""
    return build(family, **ALL_FULL, **changes)


def test_both_are_among_the_families() -> None:
    assert {"gemma2", "gpt-oss"} <= set(FAMILIES)
    assert {plain(family).config._attn_implementation for family in ("gemma2", "gpt-oss")} == {"eager"}


@every_family
def test_scorers_see_the_models_own_weights(family: str) -> None:
    """Those that transformers returns, of a prompt read whole and in parts."""
    ids = tokens(1, 40)
    model = dense(family)
    expected = model(input_ids=ids, output_attentions=True).attentions
    attach(model)
    for size in (None, 13):
        cache = prefill(model, ids, chunk_size=size, window=9)
        for layer, weights in zip(cache.compressed_layers(), expected, strict=True):
            ours, _ = layer.observation().window_attention(9)
            torch.testing.assert_close(ours.flatten(1, 2), weights[:, :, -9:], rtol=1e-3, atol=1e-5)


@every_family
def test_kvzip_reads_the_models_own_weights(family: str) -> None:
    """Attention of a pass that repeats the prompt, to all that its tokens see."""
    model, ids = dense(family), tokens(1, 20)
    repeated = model(input_ids=torch.cat([ids, ids], 1), output_attentions=True).attentions
    policy = Policy(KVzip(prefix=0, before=(), after=(), softmax="all", overlap=0, chunk=20, first="sinks", sinks=0))
    cache = prefill(attach(model), ids, policies=[policy])
    for layer, weights in zip(cache.compressed_layers(), repeated, strict=True):
        expected = weights[:, :, 20:, :20].unflatten(1, (2, -1)).amax((2, 3))
        torch.testing.assert_close(policy.scorer(layer.observation()), expected, rtol=1e-3, atol=1e-5)


@every_family
@pytest.mark.parametrize("selector", [DELTA(page_size=4, dense_layers=0), Quest(page_size=4)])
def test_reading_every_page_is_the_full_cache(family: str, selector: Any) -> None:
    model, ids = dense(family), tokens(2, 50)
    whole = model(input_ids=ids).logits
    policy = Policy(None, pages=selector)
    cache = policy.compress(prefill(attach(model), ids[:, :44], policies=[policy]), budget=100)
    for number in range(44, 50):
        assert_logits_close(continuation(model, ids[:, number : number + 1], cache), whole[:, number : number + 1])


@every_family
def test_fewer_bits_and_what_was_evicted_take_part(family: str) -> None:
    """With 8 bits nearly the full cache; evicted entries that are remembered bring the output nearer to it."""
    model, ids = dense(family), tokens(2, 50)
    whole = model(input_ids=ids).logits[:, 40:]
    full = prefill(attach(model), ids[:, :40], policies=[Policy(SnapKV())])

    def distance(policy: Policy, **spend: float) -> float:
        small = policy.compress(full.fork(), **spend)
        return float((continuation(model, ids[:, 40:], small) - whole).norm() / whole.norm())

    assert distance(Policy(SnapKV(), precision=8), keep=1) < 0.05
    relaxed = Policy(SnapKV(), residual=Moments())
    small = relaxed.compress(full.fork(), keep=0.5)
    trained = relaxed.relax(full.fork(), keep=0.5)
    assert_logits_close(*(continuation(model, ids[:, 40:], cache) for cache in (small, trained)))
    assert distance(relaxed, keep=0.5) != distance(Policy(SnapKV()), keep=0.5)


@every_family
def test_a_loaded_prompt_is_compressed_as_the_one_that_was_read(family: str, tmp_path: Path) -> None:
    model, policy = attached(family), Policy(SnapKV(window=8))
    cache = prefill(model, *padded([tokens(1, 40)[0], tokens(1, 25)[0]]), policies=[policy])
    loaded = load_cache(save_cache(cache, tmp_path / "cache"), model)
    pair = [policy.compress(each, keep=0.3) for each in (cache, loaded)]
    assert [kept(pair[0], row) for row in (0, 1)] == [kept(pair[1], row) for row in (0, 1)]
    assert torch.equal(*(continuation(model, tokens(2, 3), each) for each in pair))


@every_family
@torch.enable_grad()
def test_the_gradient_of_gates_is_the_slope_of_the_loss(family: str) -> None:
    """Of all gates of all layers along one direction, against a central difference; norms round to float32."""
    every_expert = {"num_experts_per_tok": 4} if family == "gpt-oss" else {}  # a choice would make steps
    model, ids, new = attach(dense(family, **every_expert)).double(), tokens(1, 24), tokens(1, 5)
    model.config._experts_implementation = "eager"  # others have no float64
    with torch.no_grad():
        prompt = prefill(model, ids)
    noise = torch.Generator().manual_seed(0)
    shape = (2, 1, model.config.num_key_value_heads, 24)
    gates = torch.rand(shape, generator=noise, dtype=torch.float64) * 0.8 + 0.1
    direction = torch.randn(shape, generator=noise, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        cache = prompt.fork()
        for layer, own in zip(cache.compressed_layers(), values, strict=True):
            layer.gate(own)
        return continuation(model, new, cache).log_softmax(-1)[..., 7].sum()

    leaf = gates.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf), leaf)
    with torch.no_grad():
        difference = (loss(gates + 3e-3 * direction) - loss(gates - 3e-3 * direction)) / 6e-3
    assert abs(float(difference)) > 0.1
    torch.testing.assert_close((slope * direction).sum(), difference, rtol=1e-2, atol=0)


def test_expected_attention_needs_the_mean_alone() -> None:
    model = attached("gemma2")
    policy = load_policy("expected_attention")
    cache = prefill(model, tokens(1, 30), policies=[policy])
    with pytest.raises(UserError, match="no closed form with soft-capped logits, expected covariance=false"):
        policy.compress(cache.fork(), keep=0.5)
    policy.scorer.covariance = False
    policy.compress(cache, keep=0.5)


def with_argument(model: PreTrainedModel, **more: Any) -> PreTrainedModel:
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs | more), with_kwargs=True)
    return model


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_what_a_layers_own_attention_does_not_compute_is_refused(name: str) -> None:
    model = with_argument(attach(build("llama")), **{name: torch.ones(4) if name == "s_aux" else 1.0})
    with pytest.raises(UserError, match=f"^LlamaAttention uses {name}, which"):
        prefill(model, tokens(1, 5))
    if name != "position_bias":  # which sdpa knows
        with pytest.raises(UserError, match=f"^LlamaAttention uses {name}, which"):
            model(input_ids=tokens(1, 5))


def test_other_sinks_than_the_layers_own_are_refused() -> None:
    attention = plain("gpt-oss").model.layers[0].self_attn
    assert softmax_terms(attention, None, attention.sinks).sinks is attention.sinks
    with pytest.raises(UserError, match=r"^GptOssAttention uses s_aux, which"):
        softmax_terms(attention, None, attention.sinks.clone())
    with pytest.raises(UserError, match=r"^GptOssAttention uses softcap, which"):
        softmax_terms(attention, 5.0, attention.sinks)


@torch.enable_grad()
def test_sinks_that_would_be_trained_are_refused() -> None:
    model = attach(dense("gpt-oss"))
    policy = load_policy("snapkv")
    with torch.no_grad():
        cache = policy.relax(prefill(model, tokens(1, 30)), keep=0.5)
    continuation(model, tokens(1, 3), cache.fork())
    model.model.layers[0].self_attn.sinks.requires_grad_(True)
    with pytest.raises(UserError, match=r"^GptOssAttention: its attention sinks require .* freeze the model$"):
        continuation(model, tokens(1, 3), cache)
