"""What is refused in one line: prompts, settings and ways of decoding."""

import functools
from typing import Any

import pytest
import torch
from support.models import attached, build, padded, plain, policy_for, tokens
from torch import Tensor

from learnkv import CompressedCache, Policy, continuation, generate, prefill
from learnkv.errors import UserError
from learnkv.scorers import SnapKV


@pytest.mark.compat
@pytest.mark.parametrize("how", [{"assistant_model": 1}, {"prompt_lookup_num_tokens": 2}])
def test_assisted_decoding_is_refused(how: dict[str, int]) -> None:
    if "assistant_model" in how:
        how = {"assistant_model": plain("llama")}
    model, ids = attached("llama"), tokens(1, 34)
    for cache in (
        CompressedCache(model.config),
        policy_for("snapkv", model).compress(prefill(model, ids[:, :30]), keep=0.4),
    ):
        with pytest.raises(UserError, match="assisted decoding does not work with a CompressedCache"):
            model.generate(ids, past_key_values=cache, max_new_tokens=4, **how)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 num_beams=1: expected at least 1"),
        ({"num_beams": 0}, "max_new_tokens=2 num_beams=0: expected at least 1"),
        ({"temperature": 0.0}, "temperature=0 .* expected temperature > 0"),
        ({"top_p": 0.0}, "top_p=0 .* 0 < top_p <= 1"),
        ({"top_k": -1}, "top_k=-1: .* top_k >= 0"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2: .* do_sample or stop"),
        ({"num_beams": 2, "stop": lambda said: said[:, 0] > 0}, "num_beams=2: .* do_sample or stop"),
        ({"attention_mask": torch.ones(1, 4)}, r"attention_mask of shape \[1, 4\]: expected \[1, 3\]"),
        ({"attention_mask": torch.zeros(1, 3)}, "empty question: expected at least one token in every row"),
    ],
)
def test_settings_are_checked(settings: dict[str, int | Tensor], line: str) -> None:
    with pytest.raises(UserError, match=line):
        generate(
            attached("llama"),
            tokens(1, 3),
            prefill(attached("llama"), tokens(1, 9)),
            **{"max_new_tokens": 2, **settings},
        )


@pytest.mark.parametrize(
    ("ids", "mask", "line"),
    [
        (tokens(2, 0), None, r"input_ids of shape \[2, 0\]: expected \[batch, tokens\] with at least one token"),
        (tokens(1, 9)[0], None, r"input_ids of shape \[9\]"),
        (*padded([tokens(1, 9)[0], tokens(1, 5)[0]], "right"), "expected left padding, found padding after a token"),
        (tokens(2, 3), torch.tensor([[1, 1, 1], [0, 0, 0]]), "prompt 1 is empty"),
        (tokens(2, 3), torch.ones(2, 4), r"attention_mask of shape \[2, 4\]: expected \[2, 3\]"),
        (tokens(2, 3), torch.full((2, 3), 0.5), "attention_mask: expected 1 for tokens and 0 for padding"),
        (tokens(2, 3).float(), None, "input_ids of type torch.float32: expected a tensor of int64 or int32"),
        (torch.tensor([[1, 97]]), None, "input_ids: 97 is no token of this model, which embeds 97"),
        (torch.tensor([[1, -1]]), None, "input_ids: -1 is no token of this model"),
        ([[1, 2]], None, "input_ids of type list: expected a tensor of int64 or int32"),
        (tokens(1, 513), None, "prompt of 513 tokens: the model's context is 512"),
    ],
)
def test_prompts_are_checked(ids: Tensor, mask: str | None, line: str) -> None:
    with pytest.raises(UserError, match=line):
        prefill(attached("llama"), ids, mask)


def test_questions_have_tokens_of_the_model() -> None:
    model = attached("llama")
    cache = prefill(model, tokens(1, 9))
    for call in (continuation, functools.partial(generate, max_new_tokens=2)):
        with pytest.raises(UserError, match="input_ids: 97 is no token of this model, which embeds 97"):
            call(model, torch.tensor([[97]]), cache)


@pytest.mark.parametrize(
    ("policies", "line"),
    [
        ("snapkv", "^policies= of type str: expected a list of policies$"),
        (["snapkv"], "^policies= with a str: expected policies, as load_policy gives them$"),
        (Policy(SnapKV()), "^policies= of type Policy: expected a list of policies$"),
    ],
)
def test_policies_are_checked(policies: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        prefill(attached("llama"), tokens(1, 9), policies=policies)


def test_a_model_of_other_sizes_cannot_continue_a_prompt() -> None:
    cache = prefill(attached("llama"), tokens(1, 9))
    with pytest.raises(UserError, match=r"\(4, 16, 16\) kv heads and channels continue a prompt of \(2, 16, 16\)"):
        continuation(build("llama", num_key_value_heads=4), tokens(1, 2), cache)


def test_the_context_is_that_of_the_model() -> None:
    model = attached("llama")
    ids, mask = padded([tokens(1, 500)[0], tokens(1, 480)[0]])
    cache = policy_for("snapkv", model).compress(prefill(model, ids, mask), keep=0.1)
    question = padded([tokens(1, 2)[0], tokens(1, 30)[0]], "right")  # 502 and 510 tokens, in 530 slots
    assert continuation(model, question[0], cache.fork(), question[1]).isfinite().all()
    with pytest.raises(UserError, match="513 tokens with the continuation: the model's context is 512"):
        continuation(model, tokens(2, 13), cache)
    with pytest.raises(UserError, match="chunk_size=0: expected at least 1 token"):
        prefill(model, ids, mask, chunk_size=0)
    with pytest.raises(UserError, match="1 rows continue 2 prompts"):
        continuation(model, tokens(1, 2), cache)


@pytest.mark.parametrize("policy", ["snapkv", "full"])
def test_more_rows_than_prompts_are_not_continued_through_transformers_either(policy: str) -> None:
    model, ids = attached("llama"), tokens(1, 9)
    cache = policy_for(policy, model).compress(prefill(model, ids[:, :6]), keep=0.5)
    for attempt in (cache, policy_for("snapkv", model).relax(prefill(model, ids[:, :6]), keep=0.5)):
        with pytest.raises(UserError, match="2 rows continue 1 prompts: repeat the cache's rows first"):
            model.generate(ids, past_key_values=attempt, max_new_tokens=2, do_sample=True, num_return_sequences=2)
