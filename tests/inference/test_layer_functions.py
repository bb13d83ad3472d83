"""Rotations and output projections are those of the layer, whatever it is made of."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.models import attached, build, tokens
from torch import nn
from transformers.models.llama import modeling_llama

from learnkv import Policy, attach, continuation, detach, load_policy, prefill
from learnkv.errors import UserError
from learnkv.ops.rotary import Layout
from learnkv.scorers import StreamingLLM

ROTATING = ("expected_attention", "triattention")
PROJECTING = ("criticalkv", "defensivekv", "restkv", "critical_adakv", "layer_defensivekv")


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[Any]:
    with torch.no_grad():
        yield


def kept(model: Any, policy: Any, keep: Any = 0.3) -> Any:
    cache = policy.compress(prefill(model, tokens(2, 60), policies=[policy]), keep=keep)
    positions = [
        cache.kept_positions(layer, row, head).tolist() for layer in range(3) for row in (0, 1) for head in (0, 1)
    ]
    return positions, continuation(model, tokens(2, 5), cache)


def rotating_by(layout: Any, order: Any, direction: Any = 1, start: Any = 0) -> Any:
    """A replacement of Llama's `apply_rotary_pos_emb`."""

    def apply(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
        pairs = layout.pairs
        cos, sin = (part.unsqueeze(unsqueeze_dim) for part in (cos, sin))
        cos, sin = (part[..., :pairs] if order == "halves" else part[..., ::2] for part in (cos, sin))
        return tuple(layout.rotate(part, cos, direction * sin) for part in (q, k))

    return apply


CONVENTIONS = {
    "interleaved": rotating_by(Layout.interleaved(8), "halves"),
    "backwards": rotating_by(Layout.halves(8), "halves", direction=-1),
    "last channels": rotating_by(Layout.halves(4, start=8), "halves"),
    "last pairs": rotating_by(Layout.interleaved(4, start=8), "halves", direction=-1),
}


def permuted(model: Any, channels: Any) -> Any:
    """The model with the channels of its queries and keys in another order."""
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight.view(-1, 16, projection.weight.shape[1])
            projection.weight.data = weight[:, channels].reshape(projection.weight.shape).clone()
    return model


@pytest.mark.parametrize("name", [*ROTATING, "rerotate"])
def test_interleaved_pairs_are_the_same_model(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama with rows of its projections in another order: every score and every rotated key must follow."""
    policy = Policy(StreamingLLM(), rerotate="start") if name == "rerotate" else load_policy(name)
    expected = kept(attached("llama"), policy)
    for convention, channels in (
        ("interleaved", torch.arange(16).view(2, 8).T.flatten()),
        ("backwards", torch.cat([torch.arange(8, 16), torch.arange(8)])),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(modeling_llama, "apply_rotary_pos_emb", CONVENTIONS[convention])
            got = kept(attach(permuted(build("llama"), channels)), policy)
        assert got[0] == expected[0]
        torch.testing.assert_close(got[1], expected[1], rtol=0, atol=5e-4)


@pytest.mark.parametrize("convention", ["last channels", "last pairs"])
def test_partial_rotation_of_the_last_channels(convention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    channels = torch.arange(16).roll(-8)
    if convention == "last pairs":
        channels = torch.cat([torch.arange(8, 16), torch.arange(8).view(2, 4).flip(0).T.flatten()])

    def first(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: Any = 1) -> Any:
        return rotating_by(Layout.halves(4), "halves")(q, k, cos, sin, unsqueeze_dim)

    def short(apply: Any) -> Any:
        return lambda q, k, cos, sin, unsqueeze_dim=1: apply(
            q, k, *(part[..., :8] for part in (cos, sin)), unsqueeze_dim
        )

    for policy in (load_policy("expected_attention"), Policy(StreamingLLM(), rerotate="end")):
        results = []
        for apply, order in ((first, torch.arange(16)), (CONVENTIONS[convention], channels)):
            with monkeypatch.context() as patch:
                patch.setattr(modeling_llama, "apply_rotary_pos_emb", short(apply))
                patch.setattr(modeling_llama.LlamaRotaryEmbedding, "forward", halved)
                results.append(kept(attach(permuted(build("llama", **half), order)), policy))
        assert results[0][0] == results[1][0]
        torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=5e-4)


def halved(self: Any, x: Any, position_ids: Any) -> Any:
    """Embeddings of half as many angles."""
    angle = position_ids.unsqueeze(-1) * 1e4 ** (-torch.arange(4) / 4)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_conventions_are_found_in_every_type(dtype: Any) -> None:
    model = attach(build("llama").to(dtype))
    obs = prefill(model, tokens(1, 30)).layers[0].observation()
    assert obs.rope.layout == Layout.halves(8)
    assert torch.equal(obs.projection, model.model.layers[0].self_attn.o_proj.weight)


def test_a_norm_after_rotation_is_refused_when_it_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    rotate = modeling_llama.apply_rotary_pos_emb
    scale = torch.linspace(0.5, 2, 16)

    def scaled(*args: Any, **kwargs: Any) -> Any:
        return tuple(part * scale for part in rotate(*args, **kwargs))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", scaled)
    model = attach(build("llama"))
    assert kept(model, load_policy("snapkv"))[1].isfinite().all()
    for policy in (*map(load_policy, ROTATING), Policy(StreamingLLM(), rerotate="start")):
        with pytest.raises(
            UserError, match=r"LlamaAttention: queries and keys before rotation are not known: .* no rotation"
        ):
            kept(model, policy)


class Scaled(nn.Linear):
    def forward(self, hidden: Any) -> Any:
        return 3 * super().forward(hidden) + 1


class Columns(nn.Module):
    """A linear map whose weight is stored in another way."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter((weight.T * 7).contiguous())

    def forward(self, hidden: Any) -> Any:
        return hidden @ self.weight / 7


@pytest.mark.parametrize("name", PROJECTING)
@pytest.mark.parametrize("made_of", ["scaled", "columns", "hook"])
def test_output_projections_are_applied_not_read(name: Any, made_of: Any) -> None:
    """A scale and a bias that the weight does not show; weights in another order; a hook that changes the result."""
    model, expected, policy = build("llama"), build("llama"), load_policy(name)
    generator = torch.Generator().manual_seed(0)
    for layer, other in zip(model.model.layers, expected.model.layers, strict=True):
        factor = torch.rand(48, 1, generator=generator) * 5
        weight = layer.self_attn.o_proj.weight
        if made_of == "columns":
            layer.self_attn.o_proj = Columns(weight * factor)
            other.self_attn.o_proj.weight.data = weight * factor
        elif made_of == "scaled":
            layer.self_attn.o_proj.__class__ = Scaled
            other.self_attn.o_proj.weight.data = 3 * weight
            other.self_attn.o_proj.bias = nn.Parameter(torch.ones(48))
        else:
            layer.self_attn.o_proj.register_forward_hook(lambda module, args, output, by=factor.T: output * by)
            other.self_attn.o_proj.weight.data = weight * factor
    assert kept(attach(model), policy)[0] == kept(attach(expected), policy)[0]


def test_a_hook_before_the_output_projection_counts_from_when_it_is_there() -> None:
    model, expected, policy = attach(build("llama")), build("llama"), load_policy("criticalkv")
    before, by = kept(model, policy)[0], torch.linspace(0, 5, 64)
    for layer, other in zip(model.model.layers, expected.model.layers, strict=True):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: args[0] * by)
        other.self_attn.o_proj.weight.data *= by
    assert kept(model, policy)[0] == kept(attach(expected), policy)[0] != before


def test_a_hook_on_the_layer_is_refused_where_its_output_matters() -> None:
    model = attach(build("llama"))
    kept(model, load_policy("criticalkv"))
    model(tokens(1, 5), output_attentions=True)  # transformers' own hooks change nothing
    kept(model, load_policy("criticalkv"))
    model.model.layers[1].self_attn.register_forward_hook(lambda module, args, output: (3 * output[0], *output[1:]))
    kept(model, load_policy("snapkv"))
    with pytest.raises(UserError, match=r"LlamaAttention: .* a forward hook \(.*lambda.*\) may change"):
        kept(model, load_policy("criticalkv"))


@pytest.mark.parametrize("name", PROJECTING)
def test_unmerged_adapters_count(name: Any) -> None:
    from peft import LoraConfig

    results, policy = [], load_policy(name)
    for merge in (False, True):
        model = build("llama")
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(r=4, target_modules=["o_proj"], lora_dropout=0.3))
        for parameter, weight in model.named_parameters():
            if "lora_B" in parameter:
                nn.init.normal_(weight, 0, 0.5)
        if merge:
            for module in model.modules():
                if hasattr(module, "lora_A") and hasattr(module, "merge"):
                    module.merge()
        results.append(kept(attach(model.eval()), policy))
        assert results[-1][0] != kept(attached("llama"), policy)[0]
    assert results[0][0] == results[1][0]


def test_gates_and_norms_before_the_output_are_refused() -> None:
    class Gated(nn.Module):
        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, hidden: Any) -> Any:
            return self.linear(hidden / hidden.norm(dim=-1, keepdim=True).clamp(min=1e-6))

    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.o_proj = Gated(layer.self_attn.o_proj)
    attach(model)
    assert kept(model, load_policy("snapkv"))[1].isfinite().all()
    with pytest.raises(UserError, match=r"LlamaAttention: .* no linear map of attention alone"):
        kept(model, load_policy("criticalkv"))


def test_layers_are_probed_once_and_leave_no_trace() -> None:
    model, calls = build("llama"), []
    attach(model)
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    for name, most in (("snapkv", 1), ("expected_attention", 12), ("expected_attention", 1), ("snapkv", 1)):
        calls.clear()
        kept(model, load_policy(name))
        assert len(calls) - 1 <= most  # one pass over the prompt and one continuation
    cache = prefill(model, tokens(1, 20), policies=[load_policy("expected_attention")])
    load_policy("snapkv").compress(cache, keep=0.5)
    assert all(layer.capture.functions is None for layer in cache.layers)
    detach(model)
    assert not any(name.startswith("_learnkv") for module in model.modules() for name in vars(module))
