"""What a model's generation config or the call asks for: the tokens of transformers' generate(), or one line."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.generation import configured, ours, theirs, until_end
from support.models import attached, padded, plain, policy_for, tokens
from transformers import GenerationConfig

from learnkv import CompressedCache, attach, continuation, generate, prefill
from learnkv.errors import RunError, UserError
from learnkv.inference.models import load_model

SOME = st.lists(st.integers(1, 96), min_size=1, max_size=40, unique=True)
OPTIONS = {
    "repetition_penalty": st.floats(0.5, 2.5),
    "encoder_repetition_penalty": st.floats(0.5, 2.0),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "min_length": st.integers(0, 60),
    "min_new_tokens": st.integers(0, 12),
    "suppress_tokens": SOME,
    "begin_suppress_tokens": SOME,
    "bad_words_ids": st.lists(st.lists(st.integers(1, 96), min_size=1, max_size=2), min_size=1, max_size=20),
    "sequence_bias": st.lists(
        st.tuples(st.lists(st.integers(1, 96), min_size=1, max_size=2), st.floats(-9, 9)).map(list),
        min_size=1,
        max_size=9,
        unique_by=lambda pair: tuple(pair[0]),
    ),
    "exponential_decay_length_penalty": st.tuples(st.integers(0, 5), st.floats(1.0, 3.0)),
    "forced_eos_token_id": st.integers(1, 96),
    "forced_bos_token_id": st.integers(1, 96),
    "remove_invalid_values": st.booleans(),
    "renormalize_logits": st.booleans(),
    "temperature": st.floats(0.2, 2.0),
    "top_k": st.integers(0, 60),
    "top_p": st.floats(0.05, 1.0),
    "min_p": st.floats(0.0, 0.5),
    "typical_p": st.floats(0.1, 1.0),
    "epsilon_cutoff": st.floats(0.0, 0.1),
    "eta_cutoff": st.floats(0.0, 0.1),
    "top_h": st.floats(0.1, 1.0),
    "eos_token_id": SOME.filter(lambda ids: len(ids) < 20),
    "pad_token_id": st.integers(0, 96),
    "length_penalty": st.floats(-1.0, 2.0),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "watermarking_config": st.fixed_dictionaries({"bias": st.floats(0.5, 4.0), "context_width": st.integers(1, 3)}),
    "max_time": st.just(1000.0),
    "return_dict_in_generate": st.just(True),
    "output_scores": st.just(True),
    "use_cache": st.booleans(),
    "cache_implementation": st.sampled_from(["static", "dynamic", "quantized"]),
    "guidance_scale": st.sampled_from([1.0, 1.5]),
    "num_return_sequences": st.sampled_from([1, 2]),
    "penalty_alpha": st.just(0.6),
    "prompt_lookup_num_tokens": st.just(2),
    "max_length": st.integers(1, 200),
    "num_beams": st.integers(1, 3),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[Any]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.compat
@settings(max_examples=150, deadline=None)
@given(
    asked=st.dictionaries(st.sampled_from(sorted(OPTIONS)), st.none(), max_size=6).flatmap(
        lambda names: st.fixed_dictionaries({name: OPTIONS[name] for name in names})
    ),
    call=st.fixed_dictionaries({}, optional={"do_sample": st.booleans(), "num_beams": st.integers(1, 3)}),
    in_call=st.booleans(),
    lengths=st.lists(st.tuples(st.integers(2, 30), st.integers(1, 6)), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_every_setting_gives_the_tokens_of_transformers_or_one_line(
    asked: Any, call: Any, in_call: Any, lengths: Any, seed: Any
) -> None:
    call = {"do_sample": False, **call}
    prompts, questions = ([tokens(1, pair[index], seed=7 + index)[0] for pair in lengths] for index in (0, 1))
    with configured({} if in_call else asked) as (untouched, model):
        if in_call:
            call = {**asked, **call}
        torch.manual_seed(seed)
        expected = theirs(untouched, prompts, questions, **call)
        torch.manual_seed(seed)
        refusal = None
        try:
            said = ours(model, prompts, questions, **call)
        except (UserError, RunError) as error:
            refusal = str(error)
        if refusal is not None:
            assert "\n" not in refusal
            return
        ends = {**asked, **call}.get("eos_token_id") or []
        assert expected is not None, (asked, call)
        assert [until_end(row, ends) for row in said] == [until_end(row, ends) for row in expected]


REFUSED = {
    "guidance_scale": 1.5,
    "num_return_sequences": 2,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "prompt_lookup_num_tokens": 2,
    "assistant_early_exit": 1,
    "constraints": [1],
    "force_words_ids": [[3]],
    "num_beam_groups": 2,
    "diversity_penalty": 0.5,
    "token_healing": True,
    "cache_implementation": "quantized",
}


@pytest.mark.compat
@pytest.mark.parametrize("in_call", [True, False])
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_other_tokens_is_refused_by_name(name: Any, in_call: Any) -> None:
    asked = {name: REFUSED[name]}
    with configured({} if in_call else asked) as (_, model):
        cache = prefill(model, tokens(1, 9))
        with pytest.raises(UserError, match=rf"(^|generation config: .*){name}"):
            generate(model, tokens(1, 3), cache, max_new_tokens=2, **(asked if in_call else {}))
        assert cache.tail_length == 0


def test_names_and_values_that_transformers_does_not_know_are_refused() -> None:
    for asked, line in (
        ({"repetition_penaltee": 1.1}, "repetition_penaltee: not an argument"),
        ({"repetition_penalty": -1.0}, "generation config: .*strictly positive"),
        ({"no_repeat_ngram_size": "3"}, "generation config"),
        ({"num_beams": 2.5}, "num_beams=2.5: expected at least 1 of each, whole numbers"),
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 .*: expected at least 1 of each, whole numbers"),
        ({"stop_strings": "x"}, "stop_strings='x': expected tokenizer="),
        ({"stop_strings": "x", "num_beams": 2}, "num_beams=2: beam search does not go with stop_strings"),
    ):
        with pytest.raises(UserError, match=line):
            generate(
                attached("llama"),
                tokens(1, 3),
                prefill(attached("llama"), tokens(1, 9)),
                **{"max_new_tokens": 2, **asked},
            )


def test_arguments_go_before_the_generation_config_and_sampling_is_the_calls_choice() -> None:
    prompts, questions = [tokens(1, 20)[0]], [tokens(1, 4)[0]]
    free = ours(attached("llama"), prompts, questions)
    with configured({"repetition_penalty": 1.8, "do_sample": True, "eos_token_id": free[0][2]}) as (_, model):
        with pytest.warns(UserWarning, match="greedy unless do_sample=True"):
            ours(model, prompts, questions)
        assert ours(model, prompts, questions, repetition_penalty=1.0)[0] == free[0][:3]
        assert ours(model, prompts, questions, repetition_penalty=None, eos_token_id=[95]) == free


@pytest.mark.compat
@pytest.mark.parametrize("search", [{}, {"num_beams": 3}])
@pytest.mark.parametrize("penalty", [{"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 1}, {"min_new_tokens": 4}])
def test_every_turn_counts_all_tokens_before_it(search: Any, penalty: Any) -> None:
    prompts, turns = [tokens(1, n, seed=3)[0] for n in (21, 20)], [tokens(2, 3, seed=4), tokens(2, 5, seed=5)]
    eos = {"eos_token_id": list(range(1, 60))} if "min_new_tokens" in penalty else {"eos_token_id": 96}
    ids, mask = padded(prompts)
    ids[1, 0] = ids[1, 1]  # the padding is counted as transformers counts it
    cache, said = prefill(attached("llama"), ids, mask), [*prompts]
    for question in turns:
        said = [torch.cat(pair) for pair in zip(said, question, strict=True)]
        answer = generate(
            attached("llama"), question, cache, max_new_tokens=4, pad_token_id=0, **search, **penalty, **eos
        )
        for row in (0, 1):
            settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **search, **penalty, **eos}
            alone = said[row][None]
            expected = plain("llama").generate(alone, attention_mask=torch.ones_like(alone), **settings)[
                0, len(said[row]) :
            ]
            mine = answer[row][: len(expected)]
            assert torch.equal(mine, expected)
            said[row] = torch.cat([said[row], expected])


def test_penalties_follow_rows_forks_and_crops() -> None:
    model, prompts = attached("llama"), [tokens(1, n, seed=6)[0] for n in (30, 17, 24)]
    question, call = tokens(3, 4, seed=7), {"max_new_tokens": 6, "repetition_penalty": 1.9}
    cache = policy_for("adakv", model).compress(prefill(model, *padded(prompts)), keep=0.4)
    together = generate(model, question, cache.fork(), **call)
    chosen = cache.fork()
    chosen.batch_select_indices(torch.tensor([2, 0]))
    chosen.batch_repeat_interleave(2)
    rows = torch.tensor([2, 2, 0, 0])
    assert torch.equal(generate(model, question[rows], chosen, **call), together[rows])
    continuation(model, tokens(3, 9, seed=8), cache)
    cache.crop(-9)
    assert torch.equal(generate(model, question, cache, **call), together)


def test_a_cache_that_does_not_know_its_tokens_serves_what_does_not_count_them() -> None:
    model, ids = attached("llama"), tokens(1, 20)
    cache = CompressedCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(UserError, match="RepetitionPenaltyLogitsProcessor counts the tokens of the prompt"):
        generate(model, tokens(1, 3), cache, max_new_tokens=2, repetition_penalty=1.2)
    known = prefill(model, ids)
    call = {"max_new_tokens": 5, "suppress_tokens": list(range(1, 50))}
    assert torch.equal(
        generate(model, tokens(1, 3), cache, **call), generate(model, tokens(1, 3), known.fork(), **call)
    )
    model(tokens(1, 2), past_key_values=known)
    with pytest.raises(UserError, match="counts the tokens of the prompt, which this cache does not know"):
        generate(model, tokens(1, 3), known, max_new_tokens=2, no_repeat_ngram_size=2)


def test_stop_strings_end_a_row_where_transformers_ends_it() -> None:
    model, tokenizer = load_model("reference")
    untouched, _ = load_model("reference")
    prompt, question = tokenizer("Red is 123. Blue is", return_tensors="pt").input_ids, tokens(1, 2)
    call = {"max_new_tokens": 12, "eos_token_id": 96, "tokenizer": tokenizer}
    free = generate(attach(model), question, prefill(model, prompt), **call)[0]
    for word in (tokenizer.decode(free[4:5]), tokenizer.decode(free[2:4])[1:]):
        said = generate(model, question, prefill(model, prompt), stop_strings=[word], **call)
        whole = torch.cat([prompt, question], 1)
        expected = untouched.generate(whole, stop_strings=[word], do_sample=False, **call)[:, whole.shape[1] :]
        assert torch.equal(said, expected)
        assert said.shape[1] < 12


@pytest.mark.parametrize("strings", [[], [5]])
def test_stop_strings_that_transformers_does_not_take_are_one_line(strings: Any) -> None:
    model, tokenizer = load_model("reference")
    with pytest.raises(UserError, match=r"stop_strings=\[5?\]: ") as caught:
        generate(
            model,
            tokens(1, 2),
            prefill(model, tokens(1, 9)),
            max_new_tokens=2,
            stop_strings=strings,
            tokenizer=tokenizer,
        )
    assert "\n" not in str(caught.value)


def test_the_generation_config_of_the_model_does_not_change() -> None:
    with configured({"repetition_penalty": 1.3, "min_new_tokens": 2}) as (_, model):
        before = GenerationConfig.from_dict(model.generation_config.to_dict())
        for search in ({}, {"num_beams": 2}, {"do_sample": True}):
            ours(model, [tokens(1, 20)[0]], [tokens(1, 4)[0]], **search)
        assert model.generation_config.to_dict() == before.to_dict()
