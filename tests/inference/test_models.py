"""Loading models: what is found, what is refused in one line, and how prompts are written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config

from learnkv.errors import UserError
from learnkv.inference import models as models_module
from learnkv.inference.digest import model_digest
from learnkv.inference.models import (
    config_hash,
    describe_model,
    load_model,
    torch_device,
    torch_dtype,
)
from learnkv.inference.prompt_format import format_prompt

WORDS = ["<s>", "</s>", "<unk>", "red", "blue", "which", "it", "is", ":", "user", "reply", "\n"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}user: {{ m['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}reply: {% endif %}"
)


def tokenizer_of(begins: bool = True, template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


def config_of(**changes: int) -> LlamaConfig:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 2, "vocab_size": len(WORDS), **changes})


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(config_of()).to(torch.float16).save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.fixture
def broken(stored: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stored, tmp_path / "broken")


def complaint(call: Callable[..., Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert len(str(caught.value)) < 300
    return str(caught.value)


def test_a_folder_gives_a_frozen_model_and_a_left_padding_tokenizer(stored: Path) -> None:
    model, tokenizer = load_model(str(stored))
    plain = AutoModelForCausalLM.from_pretrained(stored, dtype=torch.float32)
    ids = torch.tensor([[0, 3, 4, 5]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert (model.dtype, model.training, model.config._attn_implementation) == (torch.float32, False, "sdpa")
    assert not any(p.requires_grad for p in model.parameters())
    batch = tokenizer(["red", "red blue"], padding=True)
    assert batch["attention_mask"] == [[0, 1, 1], [1, 1, 1]]


def test_dtype_and_attention_are_chosen(stored: Path) -> None:
    model, _ = load_model(str(stored), dtype="bfloat16", attn="eager")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")
    assert torch_dtype("auto") == "auto"
    assert torch_dtype("float16") == torch.float16


@pytest.mark.parametrize(
    ("stored_as", "instructions", "dtype"),
    [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", True, torch.float32),
        ("float32", True, torch.float32),
    ],
)
def test_auto_is_bfloat16_where_model_and_processor_have_it(
    stored_as: str,
    instructions: bool,
    dtype: torch.dtype,
    stored: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm = AutoModelForCausalLM.from_pretrained(stored, dtype=getattr(torch, stored_as))
    lm.save_pretrained(tmp_path)
    for file in stored.glob("tokenizer*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(models_module, "cpu_has_bfloat16", lambda: instructions)
    assert load_model(str(tmp_path), device="cpu")[0].dtype == dtype
    assert load_model(str(tmp_path), device="cpu", dtype="float32")[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["no/such/folder", "./missing", "/missing", "", "~/nothing/here"])
def test_a_missing_folder_is_named_and_the_network_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("a local name reached for the network"))
    assert complaint(lambda: load_model(name)).startswith(
        f"model={name}: expected `reference`, smollm2, a model's folder"
    )


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path} has no config.json" in complaint(lambda: load_model(str(tmp_path)))


def test_corrupt_weights(broken: Path) -> None:
    (broken / "model.safetensors").write_bytes(b"\xff" * 100)
    assert f"model={broken}: its weights are corrupt" in complaint(lambda: load_model(str(broken)))
    (broken / "model.safetensors").unlink()
    assert complaint(lambda: load_model(str(broken))).startswith(f"model={broken}: ")


def test_cut_off_weights(broken: Path) -> None:
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert f"model={broken}: its weights are corrupt" in complaint(lambda: load_model(str(broken)))


def test_missing_weights_are_not_drawn_at_random(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    assert "weights are not in its files, first model.layers.2." in complaint(lambda: load_model(str(broken)))


def test_weights_of_other_sizes(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    assert complaint(lambda: load_model(str(broken))).startswith(f"model={broken}: ")


def test_not_a_causal_language_model(broken: Path) -> None:
    T5Config().save_pretrained(broken)
    assert complaint(lambda: load_model(str(broken))).endswith("expected a causal language model, got a T5Config")


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_unknown_devices(device: str) -> None:
    assert complaint(lambda: torch_device(device)).startswith(f"device={device}: ")


def test_unknown_dtype() -> None:
    line = complaint(lambda: torch_dtype("fp16"))
    assert line == "dtype=fp16: expected auto, float32, bfloat16, float16"


def test_config_hash_depends_on_sizes_only(stored: Path) -> None:
    here = config_hash(LlamaForCausalLM(config_of()))
    assert config_hash(load_model(str(stored), dtype="bfloat16")[0]) == here
    for changes in ({"num_key_value_heads": 4}, {"num_hidden_layers": 1}, {"vocab_size": 14}, {"head_dim": 8}):
        assert config_hash(LlamaForCausalLM(config_of(**changes))) != here


def test_a_model_is_described_by_name_hash_and_shapes(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(str(stored))
    shapes = {"layers": 2, "heads": 2, "head_dim": 4, "hidden_size": 16, "groups": 2}
    assert describe_model(model) == {"id": str(stored), "config_hash": config_hash(model), "shapes": shapes}
    monkeypatch.setattr(models_module, "REFERENCE", stored)
    assert describe_model(load_model("reference")[0])["id"] == "reference"


def test_a_relative_folder_is_described_by_its_full_path(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no card takes it for an id of the hub when another working folder is the current one."""
    monkeypatch.chdir(stored.parent.parent)
    name = f"{stored.parent.name}/{stored.name}"
    assert describe_model(load_model(name)[0])["id"] == str(stored.resolve())
    model = load_model(str(stored))[0]
    monkeypatch.setattr(model.config, "_name_or_path", "someone/tiny")
    assert describe_model(model)["id"] == "someone/tiny"


def test_the_digest_of_a_model_does_not_change_when_its_description_grows(
    stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_model(str(stored))
    digest, described = model_digest(model), describe_model(model)
    more = {**described, "shapes": {**described["shapes"], "another": 3}}
    monkeypatch.setattr(models_module, "describe_model", lambda model: more)
    assert model_digest(model) == digest
    monkeypatch.setattr(model.config, "num_hidden_layers", 9)
    assert model_digest(model) != digest


@pytest.mark.parametrize(("begins", "context"), [(True, "<s>red"), (False, "red")])
def test_without_a_template_the_context_begins_as_the_tokenizer_would_begin_it(begins: bool, context: str) -> None:
    tokenizer = tokenizer_of(begins)
    assert format_prompt(tokenizer, "red", " which", " it is") == (context, " which", " it is")
    assert tokenizer(context, add_special_tokens=False).input_ids == tokenizer("red").input_ids


def test_a_chat_template_goes_around_both_and_stays_separable() -> None:
    parts = format_prompt(tokenizer_of(template=TEMPLATE), " red", "\nwhich", " it is")
    assert parts == ("<s>user: red", "\nwhich\nreply: ", " it is")


SYSTEM_TEMPLATE = "<s>{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}reply: "
IGNORES_SYSTEM = TEMPLATE.replace("in messages", "in messages if m['role'] == 'user'")
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize(
    ("template", "head"),
    [
        (SYSTEM_TEMPLATE, "<s>system:be brief\nuser:red"),
        (IGNORES_SYSTEM, "<s>user: be brief\n\nred"),
        (NO_SYSTEM, "<s>user: be brief\n\nred"),
        (None, "<s>be brief\n\nred"),
    ],
)
def test_a_system_message_comes_first_whatever_the_template_knows(template: str | None, head: str) -> None:
    tokenizer = tokenizer_of(template=template)
    context, question, prefix = format_prompt(tokenizer, "red", " which", " it is", system="be brief")
    assert context == head
    assert (question.startswith(" which"), prefix) == (True, " it is")


def test_a_chat_template_can_be_left_unused() -> None:
    tokenizer = tokenizer_of(template=TEMPLATE)
    assert format_prompt(tokenizer, "red", " which", " it is", chat=False) == ("<s>red", " which", " it is")
