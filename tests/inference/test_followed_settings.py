"""Settings of a generation that can be followed are not refused; the fuzz test would not notice."""

from typing import Any

import pytest
import torch
from support.generation import configured, ours, theirs, until_end
from support.models import tokens

FOLLOWED: dict[str, Any] = {
    "repetition_penalty": 1.5,
    "encoder_repetition_penalty": 1.5,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "min_length": 30,
    "min_new_tokens": 4,
    "suppress_tokens": [1, 2, 3],
    "begin_suppress_tokens": [4],
    "bad_words_ids": [[3]],
    "sequence_bias": [[[3], 2.0]],
    "exponential_decay_length_penalty": (2, 1.5),
    "forced_eos_token_id": 5,
    "forced_bos_token_id": 5,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "eos_token_id": [3, 4],
    "pad_token_id": 3,
    "watermarking_config": {"bias": 2.0, "context_width": 1},
    "return_dict_in_generate": True,
    "use_cache": True,
    "cache_implementation": "static",
    "guidance_scale": 1.0,
    "num_return_sequences": 1,
    "max_length": 100,
}


@pytest.mark.compat
@torch.no_grad()
@pytest.mark.parametrize("search", [{}, {"num_beams": 2}])
@pytest.mark.parametrize("name", FOLLOWED)
def test_what_can_be_followed_is_not_refused(name: Any, search: Any) -> None:
    asked = {"eos_token_id": [96], name: FOLLOWED[name]}
    prompts, questions = [tokens(1, n, seed=7)[0] for n in (20, 9)], [tokens(1, n, seed=8)[0] for n in (4, 2)]
    with configured(asked) as (untouched, model):
        expected = theirs(untouched, prompts, questions, do_sample=False, **search)
        ends = asked["eos_token_id"]
        generated = ours(model, prompts, questions, **search)
    assert expected is not None
    assert [until_end(row, ends) for row in generated] == [until_end(row, ends) for row in expected]
