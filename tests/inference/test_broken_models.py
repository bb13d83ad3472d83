"""Models that cannot be loaded are one line: broken weights, a tokenizer of another model, no network."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from learnkv.errors import UserError
from learnkv.inference import models
from learnkv.inference.models import REFERENCE, empty_model, load_model

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


class Payload:
    def __reduce__(self) -> Any:
        return print, ("ran",)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """The reference model's folder without weights."""
    for file in REFERENCE.glob("*.json"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


@pytest.mark.parametrize("weights", [POINTER, b"", b"\x80\x02broken", b"PK\x03\x04" + b"\0" * 99, Payload()])
def test_a_broken_file_of_weights_is_one_line(folder: Any, weights: Any, capsys: pytest.CaptureFixture[str]) -> None:
    if isinstance(weights, bytes):
        (folder / "pytorch_model.bin").write_bytes(weights)
    else:
        torch.save({"model.embed_tokens.weight": weights}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model=") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder: Any) -> None:
    shutil.copy(REFERENCE / "model.safetensors", folder)
    model, tokenizer = load_model(str(folder))
    size = model.get_input_embeddings().num_embeddings
    tokenizer.add_tokens([f"<added {i}>" for i in range(size)])  # which no prompt need have
    tokenizer.save_pretrained(folder)
    load_model(str(folder))
    tokenizer.chat_template = "<added 0>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="its tokenizer has ids up to"):
        load_model(str(folder))
    (folder / "chat_template.jinja").unlink()
    words = {f"word{i}": i for i in range(size + 1)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0"))).save_pretrained(folder)
    with pytest.raises(UserError, match=rf"its tokenizer has ids up to {size}, the model embeds {size} tokens"):
        load_model(str(folder))


def test_special_tokens_that_the_model_does_not_embed_are_refused(folder: Any) -> None:
    model, tokenizer = load_model("reference")
    AutoModelForCausalLM.from_pretrained(REFERENCE).save_pretrained(folder)
    size = model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"eos_token": f"<the end {size}>"})
    added = len(tokenizer) - 1
    tokenizer.save_pretrained(folder)
    if added < size:
        pytest.skip("the model embeds more tokens than its tokenizer has")
    with pytest.raises(UserError, match=f"its tokenizer has ids up to {added}"):
        load_model(str(folder))


@pytest.mark.parametrize("load", [load_model, empty_model])
def test_a_hub_id_without_network_is_one_line(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "hub_fault", lambda: "huggingface.co cannot be reached (timed out)")
    with pytest.raises(
        UserError, match=r"model=nobody/nothing: no such folder, none of the models .*timed out"
    ) as caught:
        load("nobody/nothing")
    assert "\n" not in str(caught.value)
