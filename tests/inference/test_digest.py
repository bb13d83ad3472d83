"""Digests of models and tokenizers: any content counts, place and preparation do not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import build

from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.inference import lora
from learnkv.inference.attention import attach, detach
from learnkv.inference.digest import model_digest, tokenizer_digest, weights_digest
from learnkv.inference.models import REFERENCE, load_model


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    return shutil.copytree(REFERENCE, tmp_path / "model")


def digests(folder: Any, **options: Any) -> Any:
    model, tokenizer = load_model(str(folder), **options)
    return model_digest(model), tokenizer_digest(tokenizer)


def change_json(file: Any, **values: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    for key, value in values.items():
        if isinstance(content.get(key), dict) and isinstance(value, dict):
            value = {**content[key], **value}
        content[key] = value
    file.write_text(json.dumps(content))


def last_number(folder: Any) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weight = weights[max(weights, key=lambda name: weights[name].numel())]
    weight.view(-1)[-1] += 1
    save_file(weights, file, metadata={"format": "pt"})


CHANGES = {
    "a weight's last number": last_number,
    "rope_theta": lambda folder: change_json(
        folder / "config.json", rope_theta=100.0, rope_parameters={"rope_theta": 100.0}
    ),
    "rms_norm_eps": lambda folder: change_json(folder / "config.json", rms_norm_eps=1e-3),
    "eos_token_id": lambda folder: change_json(folder / "config.json", eos_token_id=7),
    "generation config": lambda folder: change_json(folder / "generation_config.json", repetition_penalty=1.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_content_of_a_model_counts(folder: Any, change: Any) -> None:
    before = digests(folder)[0]
    CHANGES[change](folder)
    assert digests(folder)[0] != before


def test_a_chat_template_counts(folder: Any) -> None:
    before = digests(folder)[1]
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert digests(folder)[1] != before


def test_neither_the_folder_nor_attach_counts_but_the_number_format_does(folder: Any, tmp_path: Path) -> None:
    before = digests(folder)
    folder.rename(tmp_path / "moved")
    assert digests(tmp_path / "moved") == before == digests("reference")
    assert digests("reference", dtype="bfloat16")[0] != before[0]
    model, _ = load_model("reference")
    assert model_digest(detach(attach(model))) == model_digest(attach(model)) == before[0]


def test_padding_of_the_last_call_does_not_count() -> None:
    _, tokenizer = load_model("reference")
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer_digest(tokenizer) == before


def change_weight(model: Any) -> None:
    model.model.norm.weight.data[-1] += 1


def change_frequency(model: Any) -> None:
    model.model.rotary_emb.inv_freq[-1] *= 1.01


def change_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-2


def change_number(model: Any) -> None:
    model.model.layers[0].self_attn.sliding_window = 7


def change_activation(model: Any) -> None:
    model.model.layers[0].mlp.act_fn = torch.nn.ReLU()


CHANGED = [change_weight, change_frequency, change_epsilon, change_number, change_activation]


@pytest.mark.parametrize("change", CHANGED)
def test_what_is_changed_in_memory_counts(change: Any) -> None:
    model = build("llama")
    before = weights_digest(model)
    assert weights_digest(model) == before
    change(model)
    assert weights_digest(model) != before


def adapted() -> Any:
    from peft import IA3Config, LoraConfig

    model = build("llama")
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False), "one")
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "two")
    model.add_adapter(IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "three")
    model.set_adapter("one")
    return model


def test_adapters_in_use_and_their_scale_count() -> None:
    """None of them is a weight."""
    model = adapted()
    digests = [weights_digest(model)]
    for change in (
        lambda: model.set_adapter("two"),
        lambda: model.model.layers[0].self_attn.q_proj.set_scale("two", 0.5),
        lambda: model.set_adapter("three"),
        lambda: model.disable_adapters(),
    ):
        change()
        digests.append(weights_digest(model))
    assert len(set(digests)) == 5
    lora.add(model, Adapter(rank=2, alpha=4.0, targets=("q_proj", "k_proj")))
    assert weights_digest(model) == digests[-1]
    assert weights_digest(adapted()) == digests[0]


def test_the_last_bit_of_a_computed_buffer_does_not_count() -> None:
    """Another processor computes rotations with another last bit."""
    model = build("llama")
    before = weights_digest(model)
    frequencies = model.model.rotary_emb.inv_freq
    frequencies.copy_(torch.nextafter(frequencies, torch.zeros(())))
    assert weights_digest(model) == before


def test_offloaded_weights_are_refused() -> None:
    model = build("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    with pytest.raises(UserError, match=r"weight lm_head.weight is offloaded"):
        weights_digest(model)
