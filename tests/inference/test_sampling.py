"""How the next token is chosen."""

from typing import Any

import torch
from support.models import attached

from learnkv.inference.generation_settings import generation_config
from learnkv.inference.sampling import Sampling, next_token, sampling_of

CPU = torch.device("cpu")


def sampling(**settings: Any) -> Sampling:
    config = generation_config(attached("llama"), {"max_new_tokens": 1, "do_sample": True, **settings})
    return sampling_of(attached("llama"), config, None, CPU, seeded=True)


def test_drawing_is_what_torch_draws() -> None:
    logits = torch.randn(400, 97, generator=torch.Generator().manual_seed(1)) * 3
    how = sampling(temperature=1.3, top_k=0)
    ours, largest = next_token(logits, how, torch.Generator().manual_seed(2))
    drawn = torch.multinomial((logits / 1.3).softmax(-1), 1, generator=torch.Generator().manual_seed(2))
    assert torch.equal(ours, drawn[:, 0])
    assert torch.equal(largest, logits.amax(-1))
    logits[3, 50] = torch.nan
    for chosen in (how, Sampling()):
        found = next_token(logits, chosen, None)[1].isnan()
        assert found.nonzero().tolist() == [[3]]


def test_a_row_without_a_token_to_draw_counts_as_not_a_number() -> None:
    how = sampling(suppress_tokens=list(range(97)))
    assert next_token(torch.randn(2, 97), how, None)[1].isnan().all()


def test_only_settings_that_repeat_the_same_operations_are_captured() -> None:
    for settings in ({"temperature": 1.3, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9}, {}):
        assert sampling(**settings).refusal is None
    assert sampling(temperature=1.3) == sampling(temperature=1.3) != sampling(temperature=1.4)
    for other in ({"suppress_tokens": [3]}, {"eta_cutoff": 0.01}, {"repetition_penalty": 1.2}):
        assert "decides on the host" in sampling(**other).refusal
