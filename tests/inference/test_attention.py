"""An attached model computes what it did before, and what cannot be expressed is refused by name."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.configs import FAMILIES
from support.models import assert_logits_close, attached, build, padded, plain, tokens
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from learnkv import CompressedCache, attach, continuation, detach, generate, load_policy, prefill
from learnkv.errors import UserError
from learnkv.inference.attention import is_attached

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def logits(model: PreTrainedModel, cache: Cache | None = None) -> Tensor:
    """Logits of a left-padded prompt, of a token after it, and of three more."""
    ids, mask = padded([tokens(1, length)[0] for length in (33, 20)])
    cache = DynamicCache(config=model.config) if cache is None else cache
    out = []
    for part in (ids[:, :29], ids[:, 29:30], ids[:, 30:]):
        seen = cache.get_seq_length() + part.shape[1]
        out.append(model(input_ids=part, attention_mask=mask[:, :seen], past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.compat
@every_family
def test_an_attached_model_is_the_untouched_one_with_an_ordinary_cache(family: str) -> None:
    before = logits(plain(family))
    assert torch.equal(logits(attached(family)), before)
    cut, whole = tokens(2, 40)[:, :-1], tokens(2, 40)
    assert torch.equal(attached(family)(input_ids=whole).logits, plain(family)(input_ids=whole).logits)
    assert torch.equal(
        attached(family)(input_ids=cut, use_cache=False).logits, plain(family)(input_ids=cut, use_cache=False).logits
    )


@pytest.mark.compat
@every_family
def test_an_attached_model_generates_what_the_untouched_one_does(family: str) -> None:
    ids, mask = padded([tokens(1, length)[0] for length in (21, 12)])
    for settings in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        ours, theirs = (
            model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, **settings)
            for model in (attached(family), plain(family))
        )
        assert torch.equal(ours, theirs)


class Rounded(QuantizedLayer):
    """A quantised layer of transformers without the package that would do the rounding."""

    def __init__(self) -> None:
        super().__init__(q_group_size=8, residual_length=4)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return (tensor * 8).round().to(torch.int8)

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor.to(torch.float32) / 8


def quantised() -> Cache:
    return Cache(layers=[Rounded() for _ in range(3)])


def test_quantised_and_static_caches_are_ordinary_ones() -> None:
    ours, theirs = (logits(model, quantised()) for model in (attached("llama"), plain("llama")))
    assert torch.equal(ours, theirs)
    assert (theirs - logits(plain("llama"))).abs().max() > 1e-2  # it did round
    ours, theirs = (
        logits(model, StaticCache(config=model.config, max_cache_len=40))
        for model in (attached("llama"), plain("llama"))
    )
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("other", [DynamicCache, quantised, lambda: None])
def test_other_caches_are_not_continued(other: Callable[..., Any] | type[Any]) -> None:
    for call in (continuation, lambda *given: generate(*given, max_new_tokens=2)):
        with pytest.raises(UserError, match=r"expected a CompressedCache, .* got (DynamicCache|Cache|NoneType)$"):
            call(attached("llama"), tokens(1, 3), other())


@pytest.mark.compat
def test_detach_restores_the_model() -> None:
    model = build("llama")
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    attributes = set(vars(model))
    assert attach(attach(model)) is model
    assert is_attached(model)
    assert model.config._attn_implementation == "learnkv"
    cache = prefill(model, tokens(1, 20))
    assert detach(detach(model)) is model
    assert not is_attached(model)
    assert model.config._attn_implementation == "sdpa"
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert set(vars(model)) == attributes
    assert torch.equal(logits(model), logits(plain("llama")))
    for stranger in (cache, CompressedCache(model.config)):
        with pytest.raises(UserError, match=r"with the model that learnkv\.attach was called on"):
            model(input_ids=tokens(1, 2), past_key_values=stranger)


def test_a_copy_is_attached_and_detached_for_itself() -> None:
    model = attach(build("llama"))
    twin = detach(copy.deepcopy(model))
    ids = tokens(1, 30)
    assert torch.equal(logits(twin), logits(plain("llama")))
    assert is_attached(model)
    cache = load_policy("snapkv").compress(prefill(model, ids), keep=0.5)
    assert continuation(model, ids, cache).isfinite().all()


def test_another_attention_is_switched_with_a_notice_and_switched_back() -> None:
    model = build("llama", attn="eager")
    with pytest.warns(UserWarning, match="'eager' is replaced by sdpa"):
        attach(model)
    assert torch.equal(logits(model), logits(plain("llama")))
    assert detach(model).config._attn_implementation == "eager"


def test_gemma2_works_without_its_capping() -> None:
    models = [build("gemma2", attn_logit_softcapping=None) for _ in range(2)]
    with pytest.warns(UserWarning, match="replaced by sdpa"):
        attach(models[0])
    ids = tokens(2, 40)
    told = models[1](input_ids=ids, past_key_values=DynamicCache(config=models[1].config)).logits
    cache = prefill(models[0], ids[:, :33], chunk_size=10)
    assert cache.compressible == [1, 3]
    assert_logits_close(continuation(models[0], ids[:, 33:], cache), told[:, 33:])


@pytest.mark.parametrize("argument", ["softcap", "s_aux"])
def test_arguments_of_attention_are_refused_by_name(argument: str) -> None:
    model = attach(build("llama"))
    attention = model.model.layers[1].self_attn
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, argument: 1.0}), with_kwargs=True
    )
    with pytest.raises(UserError, match=f"LlamaAttention uses {argument}"):
        prefill(model, tokens(1, 5))


@pytest.mark.compat
def test_a_sliding_window_is_refused_once_it_is_exceeded() -> None:
    model = attach(build("mistral", sliding_window=20))
    said = continuation(model, tokens(1, 5), cache := prefill(model, tokens(1, 15)))
    assert torch.equal(
        said, continuation(attached("mistral"), tokens(1, 5), prefill(attached("mistral"), tokens(1, 15)))
    )
    with pytest.raises(UserError, match=r"MistralAttention attends to a sliding window of 20 tokens, 21 were read"):
        continuation(model, tokens(1, 1), cache)
    with pytest.raises(UserError, match="sliding window of 20 tokens, 21 were read"):
        prefill(model, tokens(1, 21))


def test_models_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="expected a transformers model, got Linear"):
        attach(nn.Linear(2, 2))
    odd = build("llama")
    del odd.model.layers[1].self_attn.o_proj
    with pytest.raises(UserError, match="llama: found 2 attention layers of 3"):
        attach(odd)


def test_compiled_models() -> None:
    small = {"num_hidden_layers": 1}
    model, ids = build("llama", **small), tokens(1, 24)
    with pytest.raises(UserError, match=r"got OptimizedModule \(compile it after attach\)"):
        attach(torch.compile(model, backend="eager"))
    policy, said = load_policy("snapkv"), []
    for one in (attach(build("llama", **small)), torch.compile(attach(model), backend="eager")):
        cache = policy.compress(prefill(one, ids), keep=0.5)
        said.append(torch.cat([continuation(one, part, cache) for part in tokens(1, 4).split(2, 1)], 1))
    assert torch.equal(*said)


@pytest.mark.parametrize("second", ["cpu", "disk"])
def test_weights_placed_by_a_device_map(second: str, tmp_path: Path) -> None:
    plain("llama").save_pretrained(tmp_path)
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": second, "model.layers.2": "cpu"}
    model = LlamaForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    whole = prefill(model, tokens(1, 30))
    for layer, expected in zip(whole.layers, attached("llama").model.layers, strict=True):
        matrix = layer.observation().projection
        torch.testing.assert_close(matrix, expected.self_attn.o_proj.weight, rtol=0, atol=1e-5)
    cache = load_policy("snapkv").compress(whole, keep=0.5)
    other = load_policy("snapkv").compress(prefill(attached("llama"), tokens(1, 30)), keep=0.5)
    assert torch.equal(continuation(model, tokens(1, 4), cache), continuation(attached("llama"), tokens(1, 4), other))


class Int8Linear(nn.Module):
    """A linear layer with a packed weight, as quantised models have them."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().amax() / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.weight.to(hidden.dtype) * self.scale).T


def test_quantised_weights() -> None:
    models = [build("llama"), build("llama")]
    for model in models:
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                setattr(layer.self_attn, name, Int8Linear(getattr(layer.self_attn, name)))
    attach(models[0])
    assert torch.equal(logits(models[0]), logits(models[1]))
    assert not torch.equal(logits(models[1]), logits(plain("llama")))
    cache = prefill(models[0], tokens(1, 30))
    packed = models[0].model.layers[0].self_attn.o_proj
    expected = packed.weight * packed.scale
    torch.testing.assert_close(cache.layers[0].observation().projection, expected, rtol=0, atol=1e-5)
    assert cache.layers[0].observation().keys.dtype == torch.float32
    small = load_policy("adakv").compress(cache.fork(), keep=0.5)
    assert continuation(models[0], tokens(1, 4), small).isfinite().all()
