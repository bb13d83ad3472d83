"""Adapters: they act on what is read after compression and on nothing else, and go where their policy goes."""

import dataclasses
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.models import build
from transformers import DynamicCache, PreTrainedModel

from learnkv import attach, continuation, generate, load_policy, prefill, save_policy
from learnkv.core.adapter import Adapter
from learnkv.errors import UserError
from learnkv.evaluation.config import Budget
from learnkv.evaluation.jobs import jobs_of
from learnkv.inference import lora
from learnkv.inference.digest import model_digest
from learnkv.inference.models import describe_model
from learnkv.policy.policy import Policy
from learnkv.scorers import SnapKV

NEW = Adapter(rank=2, alpha=4.0, targets=("q_proj", "o_proj"))
PROMPT = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
NEXT = torch.randint(3, 90, (2, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model() -> PreTrainedModel:
    return attach(build("llama"))


def disturbed(model: PreTrainedModel, seed: int = 0) -> Adapter:
    """The adapter of the model with weights that change something."""
    if "learnkv" not in getattr(model, "peft_config", ()):
        lora.add(model, NEW)
    for at, weight in enumerate(lora.weights(model, NEW).values()):
        weight.data.normal_(generator=torch.Generator().manual_seed(100 * seed + at))
    return lora.current_weights(model, NEW)


def policy(adapter: Adapter | None = None) -> Policy:
    made = Policy(SnapKV(window=8), sinks=2, recent=4)
    made.adapter = adapter
    return made


@torch.no_grad()
def test_an_adapter_acts_only_after_compression(model: PreTrainedModel) -> None:
    whole = prefill(model, PROMPT)
    full = continuation(model, NEXT, whole.fork())
    small = continuation(model, NEXT, policy().compress(whole.fork(), keep=0.3))
    mine = disturbed(model)
    again = prefill(model, PROMPT)
    for one, other in zip(whole.compressed_layers(), again.compressed_layers(), strict=True):
        assert torch.equal(one.prompt.keys, other.prompt.keys)
        assert torch.equal(one.prompt.values, other.prompt.values)
    held = policy(mine).compress(again.fork(), keep=0.3)
    one_shot = prefill(model, PROMPT, policy=policy(mine), keep=0.3)
    bare = policy().compress(again.fork(), keep=0.3)
    said = continuation(model, NEXT[:, :2], held)
    assert torch.equal(continuation(model, NEXT, bare), small)  # interleaved with one that has an adapter
    said = torch.cat([said, continuation(model, NEXT[:, 2:], held)], 1)
    assert (said - small).abs().max() > 0.1
    torch.testing.assert_close(continuation(model, NEXT, one_shot), said, rtol=1e-4, atol=1e-4)
    assert torch.equal(continuation(model, NEXT, again.fork()), full)
    assert torch.equal(continuation(model, NEXT, policy(mine).compress(again.fork(), keep=1.0)), full)
    assert torch.equal(model(PROMPT, past_key_values=DynamicCache()).logits, build("llama")(PROMPT).logits)


def test_its_weights_are_read_once_and_not_at_every_step(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = policy(disturbed(model)).compress(prefill(model, PROMPT), keep=0.3)
    digests: list[bytes] = []

    def sha256(content: bytes) -> Any:
        digests.append(content)
        return hashlib.sha256(content)

    monkeypatch.setattr("learnkv.core.adapter.hashlib", SimpleNamespace(sha256=sha256))
    generate(model, NEXT, cache, max_new_tokens=9)
    assert len(digests) <= 1


def test_an_adapter_is_what_low_rank_matrices_added_to_the_weights_are(model: PreTrainedModel) -> None:
    mine = disturbed(model)
    held = policy(mine).compress(prefill(model, PROMPT), keep=0.3)
    with torch.no_grad():
        said = continuation(model, NEXT, held.fork())
        plain = attach(build("llama"))
        bare = policy().compress(prefill(plain, PROMPT), keep=0.3)
        for name, weight in plain.named_parameters():
            down = mine.state.get(f"base_model.model.{name.replace('.weight', '.lora_A.weight')}")
            if down is not None:
                up = mine.state[f"base_model.model.{name.replace('.weight', '.lora_B.weight')}"]
                weight += 4.0 / 2 * up @ down
        torch.testing.assert_close(said, continuation(plain, NEXT, bare), rtol=1e-4, atol=1e-4)
    tokens = generate(model, NEXT, held.fork(), max_new_tokens=4)
    last = continuation(plain, NEXT, policy().compress(prefill(attach(build("llama")), PROMPT), keep=0.3))[:, -1]
    assert tokens[:, 0].tolist() == last.argmax(-1).tolist()


def test_an_exported_policy_takes_its_adapter_along(model: PreTrainedModel, tmp_path: Path) -> None:
    mine = disturbed(model)
    held = policy(mine).compress(prefill(model, PROMPT), keep=0.3)
    with torch.no_grad():
        said = continuation(model, NEXT, held)
    folder = save_policy(policy(mine), tmp_path / "policy", model=describe_model(model))
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 2
    assert load_file(folder / "adapter" / "adapter_model.safetensors").keys() == mine.state.keys()
    loaded, other = load_policy(folder), attach(build("llama"))
    digest = model_digest(other)
    with torch.no_grad():
        assert torch.equal(continuation(other, NEXT, loaded.compress(prefill(other, PROMPT), keep=0.3)), said)
    assert model_digest(other) == digest  # what was measured of other policies stays valid
    assert not any(weight.requires_grad for weight in lora.weights(other, loaded.adapter).values())
    second = policy(disturbed(model, seed=1))
    with torch.no_grad():  # two adapters in one model, each for its own caches
        apart = continuation(other, NEXT, second.compress(prefill(other, PROMPT), keep=0.3))
        assert torch.equal(continuation(other, NEXT, loaded.compress(prefill(other, PROMPT), keep=0.3)), said)
    assert (apart - said).abs().max() > 0.1
    names = {"a": policy(), "b": policy(mine), "c": second}
    assert len({job.digest for job in jobs_of(model, names, [])}) == 1
    assert len({job.digest for job in jobs_of(model, names, [Budget(keep=0.3)])}) == 4


def test_an_adapter_that_does_not_fit_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    mine = disturbed(model)
    other = attach(build("llama"))
    held = prefill(other, PROMPT)

    def read(adapter: Adapter) -> None:
        continuation(other, NEXT, policy(adapter).compress(held.fork(), keep=0.3))

    key = next(iter(mine.state))
    wrong = {**mine.state, key: torch.zeros(2, 999)}
    with pytest.raises(UserError, match=r"adapter: .*lora_A.* has the shape \(2, 999\)"):
        read(dataclasses.replace(mine, state=wrong))
    with pytest.raises(UserError, match="targets=nothing do not fit"):
        read(dataclasses.replace(mine, targets=("nothing",)))
    with pytest.raises(UserError, match="does not have"):
        read(NEW)
    folder = save_policy(policy(mine), tmp_path / "policy", model=describe_model(model))
    config = folder / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 2', '"r": 2000000000'))
    with pytest.raises(UserError, match=r"expected a LoRA adapter \(rank 2000000000, its matrices have \[2\]\)"):
        load_policy(folder)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="expected a LoRA adapter"):
        load_policy(folder)
    (folder / "adapter" / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="expected a LoRA adapter"):
        load_policy(folder)
    read(mine)
