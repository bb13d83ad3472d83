"""A cache that was made or continued within torch.inference_mode is used outside of it, and the other way round."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from support.models import attached, padded, policy_for, tokens

from learnkv import continuation, generate, load_policy, prefill
from learnkv.errors import UserError

POLICIES = ["full", "adakv", "quest", "h2o_decode"]


def turns(name: str, modes: list[bool], static: bool = False) -> list[Any]:
    """Answers of as many turns, the prompt read in the first mode; True: within inference mode."""
    model, answers, cache = attached("llama"), [], None
    for turn, mode in enumerate(modes):
        with torch.inference_mode() if mode else contextlib.nullcontext():
            if cache is None:
                policy = policy_for(name, model) if name == "adakv" else load_policy(name)
                prompts = [tokens(1, length, seed=1)[0] for length in (60, 47)]
                cache = policy.compress(prefill(model, *padded(prompts), policies=[policy]), keep=0.5)
            question = tokens(2, 3, seed=turn)
            answers.append(generate(model, question, cache, max_new_tokens=9).clone())
            with torch.no_grad():
                answers.append(continuation(model, tokens(2, 2, seed=turn), cache).clone())
    return answers


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    "modes", [[True, False, False], [True, False, True], [False, True, False], [True, True, False]]
)
@pytest.mark.parametrize("static", [False, True])
def test_turns_are_the_same_in_every_mode(name: Any, modes: Any, static: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if static:
        if name not in ("full", "adakv"):
            pytest.skip("its steps are not captured")
        monkeypatch.setattr("learnkv.inference.decode_loop.refusal", lambda *_: None)
        monkeypatch.setattr("learnkv.inference.decode_loop.capture", lambda step, *_: step)
    for one, other in zip(turns(name, modes), turns(name, [False] * 3), strict=True):
        assert torch.equal(one.long(), other.long())
        assert torch.equal(one, other)


def test_beams_forks_and_row_selection_outside() -> None:
    model = attached("llama")
    with torch.inference_mode():
        cache = prefill(model, tokens(2, 40))
        generate(model, tokens(2, 3), cache, max_new_tokens=5)
    again = prefill(model, tokens(2, 40))
    generate(model, tokens(2, 3), again, max_new_tokens=5)
    for each in (cache, again):
        each.batch_select_indices(torch.tensor([1, 0]))
        each.crop(-2)
    call = {"max_new_tokens": 6, "num_beams": 3, "repetition_penalty": 1.3}
    said = [generate(model, tokens(2, 4), each.fork(), **call) for each in (cache, again)]
    assert torch.equal(*said)


def test_training_on_it_is_refused_in_one_line() -> None:
    model = attached("llama")
    policy = copy.deepcopy(policy_for("ranked", model)).requires_grad_()
    with torch.inference_mode():
        cache = prefill(model, tokens(2, 40), policies=[policy])
    for attempt in (policy.relax, policy.plan):
        with pytest.raises(UserError, match=r"read within torch.inference_mode, .* cannot be used in training"):
            attempt(cache, keep=0.4)
    with torch.no_grad():
        again = prefill(model, tokens(2, 40), policies=[policy])
        assert torch.equal(policy.plan(cache, keep=0.4).budgets, policy.plan(again, keep=0.4).budgets)
