"""Our policies in kvpress: the same entries are kept, and what follows is said alike."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import assert_logits_close, attached, build, kept_mask, padded, policy_for, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from learnkv import Policy, attach, continuation, detach, load_model, load_policy, prefill, save_policy
from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.inference.models import describe_model
from learnkv.pages import Quest
from learnkv.scorers import SnapKV

MODULE = "learnkv.integrations.kvpress"
SOME = ["snapkv", "adakv", "cake", "h2o", "kvzip", "expected_attention", "tokens", "conditioned"]


@pytest.fixture
def press() -> Any:
    """The press's class; it needs kvpress, whose transformers is older than the one that we test with."""
    pytest.importorskip("kvpress", reason="kvpress is not installed: pip install learnkv[kvpress]")
    return importlib.import_module(MODULE).LearnKVPress


def attended(model: PreTrainedModel, length: int, rows: int = 1) -> Tensor:
    """[L, B, H, S] what kvpress does not mask."""
    heads = model.config.num_key_value_heads
    found = torch.ones(len(model.model.layers), rows, heads, length, dtype=torch.bool)
    for at, layer in enumerate(model.model.layers):
        if (masked := layer.self_attn.masked_key_indices) is not None:
            found[at][masked] = False
    return found


@torch.no_grad()
def read(model: PreTrainedModel, how: Any, ids: Tensor, mask: Tensor | None = None) -> DynamicCache:
    """A prompt as kvpress's pipeline reads it."""
    cache = DynamicCache()
    with how(model):
        model.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    return cache


def test_without_kvpress_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(UserError, match=r"expected kvpress, pip install learnkv\[kvpress\]") as caught:
        importlib.import_module(MODULE)
    assert "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("keep", [0.1, 0.43])
def test_a_press_keeps_what_the_policy_keeps_and_the_same_is_said(press: Any, name: str, keep: float) -> None:
    ids, more, policy = tokens(1, 90), tokens(1, 6, seed=3), policy_for(name, attached("llama"))
    ours = prefill(attached("llama"), ids, policy=policy, keep=keep)
    model = build("llama")
    cache = read(model, press(policy, 1 - keep), ids)
    assert torch.equal(attended(model, 90)[:, 0], kept_mask(ours, 0))
    assert cache.get_seq_length() == 90  # kvpress holds everything
    told = [
        model(input_ids=one, position_ids=torch.tensor([[90 + at]]), past_key_values=cache).logits[0, -1]
        for at, one in enumerate(more.split(1, 1))
    ]
    wanted = continuation(attached("llama"), more, ours)[0]
    assert_logits_close(torch.stack(told), wanted)
    whole = continuation(attached("llama"), more, prefill(attached("llama"), ids))[0]
    assert (whole - wanted).abs().max() > 0.1  # a difference would be noticed


@torch.no_grad()
@pytest.mark.parametrize("name", ["reference", "adakv"])
def test_the_reference_model_says_the_same_in_a_pipeline(press: Any, name: str, tmp_path: Path) -> None:
    from kvpress import KVPressTextGenerationPipeline

    rain = "Rain fell on the hills all day and nobody went out of the house. "
    context, question = rain * 6 + "The secret number of Ada is 4817293. " + rain * 6, "The secret number of Ada is"
    model, tokenizer = load_model("reference")
    pipeline = KVPressTextGenerationPipeline(model=model, tokenizer=tokenizer)
    said = pipeline(context, question=question, press=press(name, 0.7), max_new_tokens=8)["answer"]
    own, _ = load_model("reference")
    ids = [
        tokenizer.encode(one, return_tensors="pt", add_special_tokens=False)
        for one in (tokenizer.bos_token + context, question + "\n")
    ]
    small = prefill(attach(own), ids[0], policy=load_policy(name), keep=0.3)
    assert torch.equal(attended(model, ids[0].shape[1])[:, 0], kept_mask(small, 0))
    answer = [int(continuation(own, ids[1], small)[0, -1].argmax())]
    while len(answer) < 8 and answer[-1] != model.generation_config.eos_token_id:
        answer.append(int(continuation(own, torch.tensor([answer[-1:]]), small)[0, -1].argmax()))
    assert said == tokenizer.decode(answer, skip_special_tokens=True)


@torch.no_grad()
def test_every_row_of_a_padded_batch_and_every_prompt_has_its_own(press: Any) -> None:
    policy, model = policy_for("adakv", attached("llama")), build("llama")
    ids, mask = padded([tokens(1, 70)[0], tokens(1, 41)[0]])
    ours = prefill(attached("llama"), ids, mask, policy=policy, keep=0.3)
    how = press(policy, 0.7)
    read(model, how, ids, mask)
    for row, length in enumerate((70, 41)):
        here = attended(model, 70, 2)[:, row, :, 70 - length :]
        assert torch.equal(here, kept_mask(ours, row))
    read(model, how, tokens(1, 50))
    assert torch.equal(
        attended(model, 50)[:, 0], kept_mask(prefill(attached("llama"), tokens(1, 50), policy=policy, keep=0.3), 0)
    )
    how.compression_ratio = 0.0
    read(model, how, tokens(1, 50))
    assert bool(attended(model, 50).all())
    plain = build("llama")(tokens(1, 50)).logits
    assert torch.equal(model(tokens(1, 50)).logits, plain)  # nothing of ours stays behind
    assert model.config._attn_implementation == "sdpa"


def test_an_exported_folder_is_a_press(press: Any, tmp_path: Path) -> None:
    policy, model = policy_for("tokens", attached("llama")), build("llama")
    folder = save_policy(policy, tmp_path / "policy", model=describe_model(model))
    ours = prefill(attached("llama"), tokens(1, 60), policy=policy, keep=0.2)
    cache = read(model, press(str(folder), 0.8), tokens(1, 60))
    assert torch.equal(attended(model, 60)[:, 0], kept_mask(ours, 0))
    assert [layer.keys.shape for layer in cache.layers] == [torch.Size([1, 2, 60, 16])] * 3
    with pytest.raises(UserError, match="trained for"), press(str(folder), 0.8)(build("qwen2")):
        pass


def test_what_kvpress_cannot_do_is_refused(press: Any) -> None:
    def enter(policy: Policy, model: PreTrainedModel | None = None, ratio: float = 0.5) -> None:
        with press(policy, ratio)(model or build("llama")):
            pass

    adapted = Policy(SnapKV())
    adapted.adapter = Adapter(2, 4.0, ("q_proj",), {"x": torch.zeros(1)})
    for policy, word in (
        (Policy(None, pages=Quest()), "pages"),
        (Policy(SnapKV(), evict_interval=8), "evict_interval"),
        (Policy(SnapKV(), rerotate="start"), "rerotate"),
        (Policy(SnapKV(), precision=4), "precision"),
        (adapted, "an adapter"),
    ):
        with pytest.raises(UserError, match=f"policy: has {word}"):
            enter(policy)
    for ratio in (-0.1, 1.0):
        with pytest.raises(UserError, match="compression_ratio="):
            enter(Policy(SnapKV()), ratio=ratio)
    mine = attach(build("llama"))
    with pytest.raises(UserError, match="detach"):
        enter(Policy(SnapKV()), mine)
    enter(Policy(SnapKV()), detach(mine))
    with pytest.raises(UserError, match="eager"):
        enter(Policy(SnapKV()), build("llama", attn="eager"))
    hybrid = build("gemma3")
    with pytest.raises(UserError, match="sliding window"):
        read(hybrid, press(Policy(SnapKV()), 0.5), tokens(1, 40))
    assert hybrid.config._attn_implementation == "sdpa"
