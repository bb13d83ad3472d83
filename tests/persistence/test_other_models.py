"""A policy of another model: refused in one line by name, or noted where only the weights differ."""

import copy
import json
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.models import attached, build, policy_for, tokens
from torch import nn

from learnkv import CompressedCache, attach, load_policy, prefill, save_policy
from learnkv.errors import UserError
from learnkv.evaluation.run import write_report
from learnkv.inference.fingerprint import describe_with_weights, weights_fingerprint
from learnkv.inference.models import describe_model, load_model
from learnkv.persistence.policies import SHIPPED, describe_policy_file

LINE = r"was made for .*num_layers=6.* \(model reference\), the model .* has .*num_layers="


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_reference_policy_names_both_models(family: Any) -> None:
    model, policy = attached(family), load_policy("reference")
    whole = prefill(model, tokens(1, 40), window=64)
    for attempt in (
        lambda: prefill(model, tokens(1, 40), policies=[policy]),
        lambda: prefill(model, tokens(1, 40), policy=policy, keep=0.4),
        lambda: policy.plan(whole, keep=0.4),
        lambda: policy.compress(whole.fork(), keep=0.4),
        lambda: policy.relax(whole, keep=0.4),
    ):
        with pytest.raises(UserError, match=LINE) as raised:
            attempt()
        assert "\n" not in str(raised.value)
    for described in (model, describe_model(model)):
        with pytest.raises(UserError, match=r"ckpt=reference: trained for reference .*, the model is "):
            load_policy("reference", model=described)


def test_a_policy_that_was_never_stored_is_checked_too() -> None:
    policy = policy_for("conditioned", attached("llama"))
    cache = CompressedCache(attached("qwen3").config, policy.capture_spec)
    attached("qwen3")(tokens(1, 40), past_key_values=cache)
    with pytest.raises(UserError, match=r"was made for num_heads=2.*, the model .* has num_heads=1"):
        policy.compress(cache, keep=0.4)


@pytest.fixture
def exported(tmp_path: Path) -> Any:
    model = attached("llama")
    return save_policy(
        policy_for("conditioned", model), tmp_path, model=describe_with_weights(model), budgets={0.1: [[0.1] * 2] * 3}
    )


@pytest.fixture
def tuned() -> Any:
    """The same model with one weight changed, as a fine-tune would."""
    model = attach(build("llama"))
    with torch.no_grad():
        list(model.parameters())[3].view(-1)[-1] += 0.5
    return model


def test_other_weights_of_the_same_shape_are_one_warning_and_a_note(
    exported: Any, tuned: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.warns(UserWarning, match="trained for the weights .* but another model") as caught:
        policy = load_policy(exported, model=tuned)
    assert len(caught) == 1
    assert "\n" not in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (
            attached("llama"),
            build("llama").to(torch.bfloat16).to(torch.float32),
            describe_model(tuned),
            None,
        ):
            assert load_policy(exported, model=model).other_weights is None
    write_report(tmp_path, tuned, {"learned-x": policy, "same": load_policy(exported)}, [], Mock(chat_template=None))
    notes = json.loads((tmp_path / "results.json").read_text())["notes"]
    assert notes == [f"learned-x: {policy.other_weights}"]
    assert notes[0] in (tmp_path / "results.md").read_text()


def test_a_manifest_without_weights_says_nothing(tmp_path: Path, tuned: Any) -> None:
    folder = save_policy(
        policy_for("conditioned", attached("llama")),
        tmp_path,
        model=describe_model(attached("llama")),
        budgets={0.1: [[0.1] * 2] * 3},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_policy(folder, model=tuned).other_weights is None


def test_the_fingerprint_follows_every_weight_and_no_number_format() -> None:
    model, _ = load_model("reference")
    print_of = weights_fingerprint(model)
    assert load_policy("reference").trained_for["weights"] == print_of
    assert weights_fingerprint(copy.deepcopy(model).to(torch.bfloat16)) == print_of
    for name, weight in copy.deepcopy(model).named_parameters():
        other = copy.deepcopy(model)
        other.get_parameter(name).data.view(-1)[-1] += 0.5 + weight.view(-1)[-1].abs()
        assert weights_fingerprint(other) != print_of, name
    with torch.device("meta"):
        assert weights_fingerprint(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_policies_of_this_package_name_their_model_and_are_small(name: str) -> None:
    folder, policy = SHIPPED[name], load_policy(name)
    model, _, kind = name.partition("-")
    assert describe_policy_file(name) == "-".join(["learned", kind] if kind else ["learned"])
    assert policy.trained_for is not None
    assert policy.trained_for["id"] == model
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    assert not re.search(r'"[/~]', (folder / "manifest.json").read_text())  # paths of whoever trained it
    other = next(shipped for shipped in sorted(SHIPPED) if shipped.partition("-")[0] != model)
    described = load_policy(other).trained_for
    with pytest.raises(UserError, match=f"^ckpt={name}: trained for {model} "):
        load_policy(name, model=described)
