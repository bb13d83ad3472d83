"""What a model's generation config or the call asks for: the tokens of transformers' generate(), or one line."""

import contextlib
import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.models import attached, padded, plain, policy_for, tokens
from transformers import GenerationConfig, PreTrainedTokenizerBase

from learnkv import CompressedCache, continuation, generate, prefill
from learnkv.errors import RunError, UserError

NEW = 9
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
    "cache_implementation": st.sampled_from(["static", "dynamic", "offloaded", "quantized"]),
    "guidance_scale": st.sampled_from([1.0, 1.5]),
    "num_return_sequences": st.sampled_from([1, 2]),
    "penalty_alpha": st.just(0.6),
    "prompt_lookup_num_tokens": st.just(2),
    "max_length": st.integers(1, 200),
    "num_beams": st.integers(1, 3),
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def configured(asked: dict[str, Any]):
    """The untouched model and the attached one with these settings in their generation configs."""
    models = plain("llama"), attached("llama")
    before = [model.generation_config for model in models]
    try:
        for model, original in zip(models, before, strict=True):
            model.generation_config = copy.deepcopy(original)
            for name, value in asked.items():
                setattr(model.generation_config, name, value)
        yield models
    finally:
        for model, original in zip(models, before, strict=True):
            model.generation_config = original


def theirs(model, prompts, questions, **call) -> list[list[int]] | None:
    """What transformers generates; None where it fails."""
    ids, mask = padded([torch.cat(pair) for pair in zip(prompts, questions, strict=True)])
    ids = ids.masked_fill(mask == 0, 0)
    try:
        said = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **call)
    except (ValueError, RuntimeError, TypeError, IndexError, OSError, ImportError, AttributeError):
        return None
    return (said if torch.is_tensor(said) else said.sequences)[:, ids.shape[1] :].tolist()


def ours(model, prompts, questions, **call) -> list[list[int]]:
    ids, mask = padded(questions, "right")
    prompt_ids, prompt_mask = padded(prompts)
    cache = prefill(model, prompt_ids.masked_fill(prompt_mask == 0, 0), prompt_mask)
    return generate(model, ids.masked_fill(mask == 0, 0), cache, mask, max_new_tokens=NEW, **call).tolist()


def until_end(row: list[int], ends: list[int]) -> list[int]:
    first = next((index for index, token in enumerate(row) if token in ends), len(row))
    return row[: first + 1]


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
def test_every_setting_gives_the_tokens_of_transformers_or_one_line(asked, call, in_call, lengths, seed):
    call = {"do_sample": False, **call}
    prompts, questions = ([tokens(1, pair[index], seed=7 + index)[0] for pair in lengths] for index in (0, 1))
    with configured({} if in_call else asked) as (untouched, model):
        if in_call:
            call = {**asked, **call}
        torch.manual_seed(seed)
        expected = theirs(untouched, prompts, questions, **call)
        torch.manual_seed(seed)
        try:
            said = ours(model, prompts, questions, **call)
        except (UserError, RunError) as error:
            assert "\n" not in str(error)
            return
        ends = {**asked, **call}.get("eos_token_id") or []
        assert expected is not None, (asked, call)
        assert [until_end(row, ends) for row in said] == [until_end(row, ends) for row in expected]
