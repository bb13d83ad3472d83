"""An exported policy as a `custom_generate` repository; transformers' pipeline and chat loop with a cache of ours."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import attached, build, padded, plain, policy_for, tokens
from transformers import GenerationConfig, PreTrainedModel, TextStreamer, pipeline

from learnkv import (
    CompressedCache,
    attach,
    generate,
    load_cache,
    load_model,
    load_policy,
    prefill,
    save_cache,
    save_policy,
)
from learnkv.errors import UserError
from learnkv.inference.models import describe_model
from learnkv.integrations import custom_generate
from learnkv.persistence.custom_generate import CODE, unchanged

NEW = 6


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An exported policy of the tiny model; what transformers copies of it goes to a folder of the test."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    made = policy_for("conditioned", attached("llama"))
    budgets = {0.1: [[0.1, 0.1]] * 3, 0.5: [[0.5, 0.5]] * 3}
    return save_policy(made, tmp_path / "exported", model=describe_model(attached("llama")), budgets=budgets)


@pytest.fixture
def model() -> PreTrainedModel:
    """A model that nothing is attached to yet."""
    return build("llama")


def by_hand(model: PreTrainedModel, policy: Any, ids: torch.Tensor, mask: torch.Tensor, end: int) -> torch.Tensor:
    cache = load_policy(policy).compress(
        prefill(model, ids[:, :end], mask[:, :end], policies=[load_policy(policy)]), 0.3
    )
    return torch.cat([ids, generate(model, ids[:, end:], cache, mask[:, end:], max_new_tokens=NEW)], 1)


@pytest.mark.compat
def test_a_folder_generates_in_one_line(folder: Path, model: PreTrainedModel) -> None:
    ids, mask = padded([tokens(1, n)[0] for n in (50, 37)])
    settings: dict[str, Any] = {"custom_generate": str(folder), "trust_remote_code": True, "max_new_tokens": NEW}
    inputs = {"input_ids": ids, "attention_mask": mask}
    ours = model.generate(**inputs, **settings, keep=0.3)
    assert torch.equal(ours, by_hand(attached("llama"), folder, ids, mask, 49))
    asked = model.generate(**inputs, **settings, keep=0.3, prompt_tokens=44)
    assert torch.equal(asked, by_hand(attached("llama"), folder, ids, mask, 44))
    whole = model.generate(**inputs, **settings, keep=1)
    assert torch.equal(whole, plain("llama").generate(**inputs, max_new_tokens=NEW, do_sample=False))
    assert not torch.equal(ours, whole), "nothing was compressed"


@pytest.mark.compat
def test_everything_else_is_transformers_own(folder: Path, model: PreTrainedModel) -> None:
    ids = tokens(1, 40)
    settings: dict[str, Any] = {"custom_generate": str(folder), "trust_remote_code": True, "keep": 0.3}
    config = GenerationConfig(max_new_tokens=NEW, num_beams=3, num_return_sequences=2, pad_token_id=0)
    beams = model.generate(ids, generation_config=config, **settings)
    assert beams.shape[0] == 2
    whole = model.generate(ids, return_dict_in_generate=True, max_new_tokens=NEW, **settings)
    assert isinstance(whole.past_key_values, CompressedCache)
    assert whole.past_key_values.spent == pytest.approx([0.3], abs=0.01)
    more = model.generate(whole.sequences, past_key_values=whole.past_key_values, max_new_tokens=2)
    assert more.shape[1] == whole.sequences.shape[1] + 2
    sampled = model.generate(ids, do_sample=True, num_return_sequences=4, max_new_tokens=2, **settings)
    assert sampled.shape == (4, 42)


@pytest.mark.compat
def test_code_runs_only_with_the_users_consent(folder: Path, model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        model.generate(tokens(1, 20), custom_generate=str(folder), trust_remote_code=False, keep=0.3, max_new_tokens=2)


def test_what_does_not_go_with_it_is_refused(folder: Path, model: PreTrainedModel) -> None:
    ids, policy = tokens(1, 20), load_policy(folder)
    cache = prefill(attach(model), ids)
    for arguments, cause in (
        ({"input_ids": ids[:, :1]}, "at least 2 tokens"),
        ({"inputs_embeds": ids}, r"expected input_ids \[batch, tokens\]"),
        ({"input_ids": ids, "past_key_values": cache}, "continue a cache without custom_generate"),
        ({"input_ids": ids, "prompt_tokens": 20}, "prompt_tokens=20: expected 1 to 19"),
        ({"input_ids": ids, "assistant_model": model}, "assistant_model: not supported"),
        ({"input_ids": ids}, "keep"),
    ):
        keep = {} if cause == "keep" else {"keep": 0.3}
        with pytest.raises(UserError, match=cause):
            custom_generate.generate(model, policy, **arguments, **keep, max_new_tokens=2)
    other = build("qwen2")
    with pytest.raises(UserError, match="trained for"):
        custom_generate.generate(other, folder, input_ids=ids, keep=0.3, max_new_tokens=2)


def test_only_the_code_that_learnkv_writes_is_pushed(folder: Path) -> None:
    assert unchanged(folder) == list(CODE)
    (folder / "custom_generate" / "generate.py").write_text("print('mine')")
    assert unchanged(folder) == ["custom_generate/requirements.txt"]
    shutil.rmtree(folder / "custom_generate")
    assert unchanged(folder) == []
    assert load_policy(folder).spec()


def test_the_file_needs_nothing_but_learnkv(folder: Path) -> None:
    """Read without importing it: its only import at the top is of the standard library."""
    code = (folder / "custom_generate" / "generate.py").read_text()
    assert [line for line in code.splitlines() if line.startswith(("import", "from"))] == ["import sys"]
    names: dict[str, Any] = {"__name__": "anything"}
    exec(code, names)
    with pytest.raises(ValueError, match=r"^policy=: expected the folder or owner/name of a policy$"):
        names["generate"](None)


RAIN = "Rain fell on the hills. " * 20
DOCUMENT = (RAIN + "The secret number of Ada is 4817293. " + RAIN).rstrip()
QUESTIONS = (" The secret number of Ada is", "\nThe secret number of Ada is")


@pytest.fixture(params=["compressed", "loaded"])
def of_the_reference(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any, CompressedCache]:
    """The reference model, its tokenizer, and a fifth of the document's cache, as it is or stored and loaded."""
    model, tokenizer = load_model("reference")
    policy = load_policy("reference")
    ids = tokenizer(DOCUMENT, return_tensors="pt").input_ids
    cache = policy.compress(prefill(model, ids, policies=[policy]), keep=0.2)
    if request.param == "compressed":
        return model, tokenizer, cache
    save_cache(cache, tmp_path / "stored", tokenizer=tokenizer)
    return model, tokenizer, load_cache(tmp_path / "stored", model)


@pytest.mark.compat
def test_transformers_pipeline_goes_on_with_a_compressed_cache(of_the_reference: tuple[Any, Any, Any]) -> None:
    model, tokenizer, cache = of_the_reference
    asked = tokenizer(QUESTIONS[0], add_special_tokens=False, return_tensors="pt").input_ids
    expected = tokenizer.decode(generate(model, asked, cache.fork(), max_new_tokens=9)[0], skip_special_tokens=True)
    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = DOCUMENT + QUESTIONS[0]
    (written,) = write(text, past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert written["generated_text"] == text + expected
    assert "4817293" in expected


@pytest.mark.compat
def test_the_chat_loop_of_transformers_documentation(
    of_the_reference: tuple[Any, Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Messages grow, the template is applied to all of them, and the cache has read the beginning already."""
    model, tokenizer, cache = of_the_reference
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    read, answers = cache.get_seq_length(), []
    messages = [{"role": "system", "content": DOCUMENT}]
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        streamer = TextStreamer(tokenizer, skip_prompt=True)
        given = {"past_key_values": cache, "max_new_tokens": 9, "do_sample": False, "streamer": streamer}
        written = model.generate(**inputs, **given)[0, inputs["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(written, skip_special_tokens=True))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert all("4817293" in answer for answer in answers)
    assert "4817293" in capsys.readouterr().out
    assert cache.get_seq_length() > read + 20


@pytest.mark.compat
def test_a_text_that_begins_with_other_tokens_is_refused(of_the_reference: tuple[Any, Any, Any]) -> None:
    """A space that ends the document belongs to the next word where both are tokenised together."""
    model, tokenizer, cache = of_the_reference
    ids = tokenizer(DOCUMENT + QUESTIONS[0], return_tensors="pt").input_ids
    other = ids.clone()
    other[0, 7] += 1
    with pytest.raises(UserError, match="input_ids differ from what the cache has read, first in slot 7 of"):
        model.generate(other, past_key_values=cache, max_new_tokens=2)
    assert model.generate(ids, past_key_values=cache, max_new_tokens=2).shape[1] == ids.shape[1] + 2
