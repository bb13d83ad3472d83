"""Lossless decoding: the full cache's tokens, whatever the draft."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.configs import FAMILIES
from support.models import LEARNED, assert_logits_close, attached, padded, plain, policy_for, tokens
from torch import Tensor

from learnkv import CompressedCache, continuation, generate, generate_lossless, load_model, prefill
from learnkv.cache.offload import offload
from learnkv.cache.shared_tail import copy_tail
from learnkv.cache.storage import Segment
from learnkv.errors import RunError, UserError
from learnkv.inference.lossless import LosslessOutput
from learnkv.persistence.methods import select_methods

REMEMBERS = "heterocache_reload"  # tokens that a draft proposes, also those that are rejected
POLICIES = [*select_methods(["all", f"-{REMEMBERS}"]), *LEARNED]
NEW = 14
MARGIN = 1e-4


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair(
    family: str, name: str, prompts: list[Tensor], keep: float | None = 0.3, **budget: Any
) -> tuple[CompressedCache, CompressedCache]:
    """The full cache of left-padded prompts, and a compressed fork of it."""
    model = attached(family)
    policy = policy_for(name, model)
    full = prefill(model, *padded(prompts), policies=[policy])
    return full, policy.compress(full.fork(), **(budget or {"keep": keep}))


def decided(family: str, prompt: Tensor, generated: Tensor) -> int:
    """Tokens [T] from the beginning whose two best logits differ by more than `MARGIN`, after the prompt [S]."""
    logits = plain(family)(torch.cat([prompt, generated[:-1]])[None]).logits[0, len(prompt) - 1 :]
    best = logits.topk(2).values
    ties = ((best[:, 0] - best[:, 1]) <= MARGIN).nonzero().flatten().tolist()
    return ties[0] if ties else len(generated)


@pytest.mark.parametrize("name", POLICIES)
def test_greedy_tokens_are_the_full_caches_for_every_policy(name: str) -> None:
    model, prompts = attached("llama"), [tokens(1, n, seed=1)[0] for n in (60, 43)]
    question = tokens(2, 5, seed=2)
    keep = 1.0 if name in ("full", "kivi", "turboquant", "quantized_4bit") else 0.25
    full, draft = pair("llama", name, prompts, keep, **({"bytes": 0.3} if name == "rdkv" else {}))
    expected = generate(model, question, full.fork(), max_new_tokens=NEW)
    output = generate_lossless(model, question, full, draft, max_new_tokens=NEW, draft_tokens=3)
    for row, prompt in enumerate(prompts):
        same = decided("llama", torch.cat([prompt, question[row]]), expected[row])
        assert same > NEW // 2
        assert torch.equal(output.tokens[row, :same], expected[row, :same])
    if name == "random":
        assert output.accepted_length < 1, "nothing was rejected, so nothing was verified"


@pytest.mark.compat
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_and_goes_on_as_with_the_full_cache(family: str) -> None:
    model, prompts = attached(family), [tokens(1, n, seed=3)[0] for n in (40, 29)]
    full, draft = pair(family, "random", prompts)
    reference = full.fork()
    for turn, length in enumerate((5, 1, 3)):
        question = tokens(2, length, seed=4 + turn)
        expected = generate(model, question, reference, max_new_tokens=9)
        output = generate_lossless(model, question, full, draft, max_new_tokens=9, draft_tokens=4)
        assert torch.equal(output.tokens, expected)
    more = tokens(2, 4, seed=9)
    assert_logits_close(continuation(model, more, full), continuation(model, more, reference))


@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_of_different_lengths_and_rows_that_end(side: str) -> None:
    model, prompts = attached("llama"), [tokens(1, n, seed=5)[0] for n in (50, 33, 21)]
    question, mask = padded([tokens(1, n, seed=6)[0] for n in (2, 7, 4)], side)
    full, draft = pair("llama", "snapkv", prompts)
    reference = full.fork()
    free = generate(model, question, full.fork(), mask, max_new_tokens=NEW)
    ends = [int(free[0, 3]), int(free[1, 6])]
    settings = {"max_new_tokens": NEW, "eos_token_id": ends, "pad_token_id": 0}
    expected = generate(model, question, reference, mask, **settings)
    output = generate_lossless(model, question, full, draft, mask, draft_tokens=5, **settings)
    assert torch.equal(output.tokens, expected)
    assert bool((expected == 0).any()), "no row ended before the others"
    assert torch.equal(full.is_token(), reference.is_token())
    more = tokens(3, 3, seed=7)
    expected = generate(model, more, reference, max_new_tokens=4)
    assert torch.equal(generate_lossless(model, more, full, draft, max_new_tokens=4).tokens, expected)


def test_all_rows_ending_ends_the_turn_where_generate_does() -> None:
    model, question = attached("llama"), tokens(1, 4, seed=8)
    full = prefill(model, tokens(1, 30))
    free = generate(model, question, full.fork(), max_new_tokens=NEW)[0].tolist()
    end = next(token for index, token in enumerate(free) if index > 1 and token not in free[:index])
    reference = full.fork()
    expected = generate(model, question, reference, max_new_tokens=NEW, eos_token_id=end)
    output = generate_lossless(model, question, full, full.fork(), max_new_tokens=NEW, eos_token_id=end, draft_tokens=9)
    assert torch.equal(output.tokens, expected)
    assert output.accepted == [[expected.shape[1] - 1]], "what was drafted after the end counts"
    assert full.get_seq_length() == reference.get_seq_length()
    assert torch.equal(full.pending[0], reference.pending[0])


def test_a_draft_that_keeps_everything_is_always_right() -> None:
    model, question = attached("qwen3"), tokens(2, 5, seed=2)
    full = prefill(model, tokens(2, 40))
    output = generate_lossless(model, question, full, full.fork(), max_new_tokens=12, draft_tokens=4)
    assert output.drafted == [4, 4, 0][:2]
    assert output.accepted == [[4, 4], [4, 4]]
    assert output.accepted_length == 4


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"min_new_tokens": 9}, {"no_repeat_ngram_size": 2}])
def test_settings_that_read_the_tokens(settings: dict[str, Any]) -> None:
    model, question = attached("llama"), tokens(1, 4, seed=8)
    full, draft = pair("llama", "random", [tokens(1, 30)[0]])
    settings["eos_token_id"] = int(generate(model, question, full.fork(), max_new_tokens=NEW, **settings)[0, 3])
    expected = generate(model, question, full.fork(), max_new_tokens=NEW, **settings)
    assert torch.equal(generate_lossless(model, question, full, draft, max_new_tokens=NEW, **settings).tokens, expected)


def test_a_stop_within_what_was_accepted() -> None:
    model, question = attached("llama"), tokens(2, 4, seed=8)
    full = prefill(model, tokens(2, 30))
    free = generate(model, question, full.fork(), max_new_tokens=NEW)

    def stop(new: Tensor) -> Tensor:
        return torch.tensor([new.shape[1] >= 3, bool((new[1] == free[1, 5]).any())])

    expected = generate(model, question, full.fork(), max_new_tokens=NEW, stop=stop)
    output = generate_lossless(model, question, full, full.fork(), max_new_tokens=NEW, stop=stop, draft_tokens=9)
    assert torch.equal(output.tokens, expected)
    assert expected.shape[1] < NEW


@pytest.mark.parametrize("name", ["snapkv", "quest", "h2o_decode", "random"])
def test_rejected_tokens_leave_no_trace_in_the_draft(name: str) -> None:
    """What the draft attends to afterwards are the keys and values of the verification, or those it read itself."""
    model, prompt, question = attached("llama"), tokens(1, 60, seed=1), tokens(1, 5, seed=2)
    full, draft = pair("llama", name, [prompt[0]], 0.2)
    fresh = draft.fork()
    output = generate_lossless(model, question, full, draft, max_new_tokens=30, draft_tokens=3)
    assert output.accepted_length < 3
    if name == "h2o_decode":
        assert draft.compressed_layers()[0].merged_tokens > 0, "the draft has not evicted again"
        assert draft.tail_length < draft.schedule.evict_interval + 4
        read = torch.cat([question, output.tokens[:, :-1]], 1)
        assert torch.equal(draft.token_ids[1], read)
        return
    copy_tail(fresh, full, 0)
    more = torch.cat([output.tokens[:, -1:], tokens(1, 1)], 1)
    fresh.pending = draft.pending = None
    for token in more.unbind(1):
        assert_logits_close(*(continuation(model, token[None], cache) for cache in (draft, fresh)))


def test_the_reference_model_at_fewer_bits() -> None:
    model, tokenizer = load_model("reference")
    ids = tokenizer("The secret number of Ada is 4817293. " * 9, return_tensors="pt").input_ids
    policy = policy_for("snapkv", model).with_precision(2)
    full = prefill(model, ids, policies=[policy])
    question = tokenizer("The secret number of Ada is", return_tensors="pt").input_ids
    expected = generate(model, question, full.fork(), max_new_tokens=16)
    draft = policy.compress(full.fork(), bytes=0.05)
    output = generate_lossless(model, question, full, draft, max_new_tokens=16, draft_tokens=4)
    assert torch.equal(output.tokens, expected)


def test_a_prompt_on_the_host_gives_the_same_and_is_compressed_no_more() -> None:
    model, question = attached("llama"), tokens(1, 4, seed=8)
    full, draft = pair("llama", "snapkv", [tokens(1, 30)[0]])
    expected = generate(model, question, full.fork(), max_new_tokens=NEW)
    output = generate_lossless(model, question, full, draft, max_new_tokens=NEW, offload=True)
    assert torch.equal(output.tokens, expected)
    assert all(layer.segment.keys.device.type == "cpu" for layer in full.compressed_layers())
    with pytest.raises(UserError, match="compressed or offloaded"):
        policy_for("snapkv", model).compress(full, keep=0.5)
    with pytest.raises(UserError, match="offload: expected a cache with all entries"):
        offload(pair("llama", "quest", [tokens(1, 30)[0]])[1])


def test_a_pool_on_another_device_is_copied_to_where_attention_runs() -> None:
    whole = Segment.whole(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), torch.arange(3)[None])
    assert whole.on(torch.device("cpu")) is whole
    moved = whole.on(torch.device("meta"))
    assert moved.keys.device.type == moved.values.device.type == "meta"
    assert moved.offset is whole.offset


def test_sampling_is_repeatable_and_equal_caches_accept_everything() -> None:
    model, question = attached("llama"), tokens(1, 4, seed=8)
    full = prefill(model, tokens(1, 30))
    settings = {"max_new_tokens": 11, "do_sample": True, "seed": 3, "draft_tokens": 4, "top_k": 0}
    runs = [generate_lossless(model, question, full.fork(), full.fork(), **settings) for _ in range(2)]
    assert torch.equal(runs[0].tokens, runs[1].tokens)
    assert runs[0].accepted == [[4], [4]]


def test_what_cannot_be_lossless_is_refused() -> None:
    model, question = attached("llama"), tokens(1, 4)
    full, draft = pair("llama", "snapkv", [tokens(1, 30)[0]])
    other = prefill(model, tokens(1, 31))
    _, evicting = pair("llama", "h2o_decode", [tokens(1, 30)[0]], budget=30)  # the whole prompt, and no more later
    ahead = draft.fork()
    remembering = pair("llama", REMEMBERS, [tokens(1, 30)[0]])[1]
    continuation(model, question, ahead)
    for cache, drafting, cause in (
        (draft, full, "cache: expected all entries"),
        (evicting, draft, "this one evicts while tokens are added"),
        (full, full, "draft: expected a compressed fork, got the cache itself"),
        (full, other, r"draft of prompts of \[31\] tokens, the cache's have \[30\]"),
        (full, remembering, "draft: pages=HeteroCache: remembers tokens, which cannot be removed"),
        (full, ahead, "draft has read 4 tokens after the prompt, the cache 0"),
        (full, None, "draft: expected a CompressedCache, as prefill returns it, got NoneType"),
    ):
        with pytest.raises(UserError, match=cause):
            generate_lossless(model, question, cache, drafting, max_new_tokens=4)
    for settings, cause in (
        ({"draft_tokens": 0}, "draft_tokens=0: expected a whole number"),
        ({"num_beams": 2}, "num_beams=2: lossless decoding is greedy or samples"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ):
        with pytest.raises(UserError, match=cause):
            generate_lossless(model, question, full, draft, **{"max_new_tokens": 4, **settings})
    hybrid, compressed = pair("gemma3", "snapkv", [tokens(1, 30)[0]])
    with pytest.raises(UserError, match="draft_tokens=30: the sliding window of 24 tokens is too short"):
        generate_lossless(attached("gemma3"), question, hybrid, compressed, max_new_tokens=40, draft_tokens=30)


def test_an_unknown_past_is_refused_where_it_must_be_read_again() -> None:
    model = attached("llama")
    full, draft = pair("llama", "h2o_decode", [tokens(1, 30)[0]])
    full.token_ids = None
    with pytest.raises(UserError, match="a draft that evicts while tokens are added counts the tokens"):
        generate_lossless(model, tokens(1, 4), full, draft, max_new_tokens=4)


def test_not_a_number_ends_the_run() -> None:
    model = attached("llama")
    full, draft = pair("llama", "snapkv", [tokens(1, 30)[0]])
    full.compressed_layers()[0].segment.values.fill_(torch.nan)
    with pytest.raises(RunError, match="NaN after 0 new tokens"):
        generate_lossless(model, tokens(1, 4), full, draft, max_new_tokens=4)


def test_accepted_length_of_nothing() -> None:
    empty = LosslessOutput(torch.zeros(1, 0))
    assert empty.accepted_length != empty.accepted_length
