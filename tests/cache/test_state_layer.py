"""States of linear attention and convolution: carried along, copied by forks, never compressed, differentiable."""

import copy
from typing import Any

import pytest
import torch
from support.configs import STATES
from support.models import assert_logits_close, attached, build, compressible, padded, policy_for, tokens
from torch import Tensor
from transformers import AutoModelForCausalLM

from learnkv import CompressedCache, attach, continuation, generate, load_policy, prefill
from learnkv.errors import UserError
from learnkv.inference.models import describe_model
from learnkv.inference.state_checks import check_states
from tools import families

pytestmark = pytest.mark.compat
every_family = pytest.mark.parametrize("family", STATES)


def states(cache: CompressedCache) -> list[Tensor]:
    """Copies of all states."""
    return [part.clone() for layer in cache.state_layers() for part in layer.states().values()]


@every_family
def test_only_attention_layers_are_counted(family: str) -> None:
    model = attached(family)
    cache = prefill(model, tokens(2, 30))
    assert states(cache)
    shapes = describe_model(model)["shapes"]
    assert shapes["layers"] == len(cache.compressed_layers()) == len(compressible(model))
    keys_and_values = shapes["layers"] * shapes["heads"] * 2 * shapes["head_dim"]
    assert cache.full_nbytes == 2 * 30 * keys_and_values * 4
    small = load_policy("snapkv").compress(cache.fork(), keep=0.5)
    assert small.budgets is not None
    assert small.budgets.sum().item() == round(0.5 * 30 * shapes["layers"] * shapes["heads"]) * 2


@every_family
def test_eviction_leaves_states_alone_and_forks_copy_them(family: str) -> None:
    model, said = attached(family), tokens(2, 5, seed=1)
    cache = prefill(model, tokens(2, 30))
    before = states(cache)
    small = load_policy("snapkv").compress(cache.fork(), keep=0.3)
    assert all(map(torch.equal, states(small), before))
    expected = continuation(model, said, small.fork())
    other = small.fork()
    generate(model, said, other, max_new_tokens=4)  # steps of one token write states in place
    assert not all(map(torch.equal, states(other), before))
    assert all(map(torch.equal, states(small), before))
    assert torch.equal(continuation(model, said, small), expected)
    assert all(map(torch.equal, states(cache), before))


@every_family
def test_gradients_pass_through_states(family: str) -> None:
    model, said = attached(family), tokens(2, 8, seed=2)
    cache = prefill(model, tokens(2, 30), policies=[policy_for("budgets", model)])
    gradients = []
    for parts in ([8], [5, 3]):
        policy = copy.deepcopy(policy_for("budgets", model)).requires_grad_(True)
        relaxed = policy.relax(cache.fork(), keep=0.4)
        logits = torch.cat([continuation(model, part, relaxed) for part in said.split(parts, 1)], 1)
        (logits.float().log_softmax(-1)[:, -3:] * torch.linspace(-1, 1, logits.shape[-1])).sum().backward()
        gradients.append([weight.grad for weight in policy.parameters() if weight.grad is not None])
    assert gradients[0]
    assert max(float(part.abs().max()) for part in gradients[0]) > 0
    for whole, in_parts in zip(*gradients, strict=True):
        torch.testing.assert_close(in_parts, whole, rtol=2e-2, atol=1e-3 * float(whole.abs().max()))


@every_family
def test_states_are_not_taken_back(family: str) -> None:
    cache = prefill(attached(family), tokens(1, 20))
    continuation(attached(family), tokens(1, 4), cache)
    with pytest.raises(UserError, match=r"crop\(-2\): states of linear attention cannot be taken back"):
        cache.crop(-2)
    cache.reset()
    assert not states(cache)


def test_rows_of_a_relaxed_cache_have_states_of_their_own() -> None:
    model, said = attached("falcon-h1"), tokens(4, 5, seed=3)
    cache = policy_for("adakv", model).relax(prefill(model, tokens(2, 20)), keep=0.5)
    alone = cache.fork()
    cache.batch_repeat_interleave(2)
    logits = continuation(model, said, cache)
    assert_logits_close(logits[::2], continuation(model, said[::2], alone))


@pytest.mark.parametrize(("name", "reason"), [("jamba", "states are lost"), ("minimax", "transformers' own cache")])
def test_states_that_are_not_carried_are_refused(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"{name}: .*{reason}"):
        attach(families.build(name))


def test_states_that_padding_changes() -> None:
    model: Any = build("lfm2", conv_bias=True)
    for layer in model.model.layers[::2]:
        torch.nn.init.normal_(layer.conv.in_proj.bias)
    attach(model)
    ids, mask = padded([tokens(1, 9)[0], tokens(1, 5)[0]])
    with pytest.raises(UserError, match="lfm2: padding changes its states: read prompts of different lengths one by"):
        prefill(model, ids, mask)
    prefill(model, ids)
    prefill(attached("lfm2"), ids, mask)


def test_nothing_is_read_on_meta_devices() -> None:
    config = build("lfm2").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    check_states(model)
    assert attach(model) is model
