"""Generating: like transformers' own generate() where nothing is evicted, turn by turn, to its end."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.configs import FAMILIES
from support.models import assert_logits_close, attached, build, kept_mask, oracle, padded, plain, policy_for, tokens
from torch import Tensor
from transformers import PreTrainedModel

from learnkv import CompressedCache, attach, continuation, generate, prefill
from learnkv.errors import RunError, UserError

every_family = pytest.mark.parametrize("family", FAMILIES)
SEARCHES = [{}, {"num_beams": 3}]
searches = pytest.mark.parametrize("search", SEARCHES, ids=["greedy", "beams"])
NEW = 8


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def compressed(family: str, *prompts: Tensor, keep: float = 0.4, name: str = "adakv") -> CompressedCache:
    """A compressed cache of left-padded prompts [S]."""
    model = attached(family)
    return policy_for(name, model).compress(prefill(model, *padded(prompts)), keep=keep)


@pytest.mark.compat
@every_family
@searches
def test_with_everything_kept_all_ways_generate_what_the_untouched_model_does(
    family: str, search: dict[str, int]
) -> None:
    model = attached(family)
    prompts, question = [tokens(1, length)[0] for length in (40, 27)], tokens(2, 5, seed=1)
    ids, mask = padded([torch.cat([prompt, said]) for prompt, said in zip(prompts, question, strict=True)])
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **search}
    expected = plain(family).generate(ids, **settings)[:, ids.shape[1] :]

    ours = generate(model, question, prefill(model, *padded(prompts)), max_new_tokens=NEW, **search)
    assert torch.equal(ours, expected)
    whole = model.generate(ids, past_key_values=CompressedCache(model.config), **settings)
    assert torch.equal(whole[:, ids.shape[1] :], expected)
    beams = search.get("num_beams", 1)
    for given in (ids, question):
        filled = prefill(model, *padded(prompts), chunk_size=16)
        filled.batch_repeat_interleave(beams)
        assert torch.equal(model.generate(given, past_key_values=filled, **settings)[:, given.shape[1] :], expected)


@pytest.mark.compat
@every_family
@searches
def test_compressed_prompts_generate_the_same_through_transformers(family: str, search: dict[str, int]) -> None:
    model, prompts, question = attached(family), [tokens(1, n, seed=2)[0] for n in (45, 31)], tokens(2, 6, seed=3)
    ours = generate(model, question, compressed(family, *prompts), max_new_tokens=NEW, **search)
    filled, mask = compressed(family, *prompts), padded(prompts)[1]
    filled.batch_repeat_interleave(search.get("num_beams", 1))
    mask = torch.cat([mask, torch.ones_like(question)], 1)
    settings = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **search}
    assert torch.equal(model.generate(question, past_key_values=filled, **settings)[:, 6:], ours)
    if not search:
        for row, prompt in enumerate(prompts):
            said = torch.cat([question[row], ours[row]])
            told = oracle(family)(prompt, kept_mask(filled, row), said[:-1])[5:]
            assert torch.equal(told.argmax(-1), ours[row])


@searches
@pytest.mark.parametrize("side", ["left", "right"])
def test_questions_of_different_lengths_are_answered_as_alone(search: dict[str, int], side: str) -> None:
    model, prompts = attached("qwen3"), [tokens(1, length, seed=4)[0] for length in (30, 44, 21)]
    questions = [tokens(1, length, seed=5)[0] for length in (7, 1, 3)]
    cache = compressed("qwen3", *prompts)
    ids, mask = padded(questions, side)
    turns = [(ids, mask), (tokens(3, 4, seed=6), None)]
    together = [generate(model, *turn[:1], cache, turn[1], max_new_tokens=NEW, **search) for turn in turns]
    for row, question in enumerate(questions):
        alone = compressed("qwen3", prompts[row])
        for said, answer in zip((question, turns[1][0][row]), together, strict=True):
            expected = generate(model, said[None], alone, max_new_tokens=NEW, **search)[0]
            assert torch.equal(answer[row], expected)


@pytest.mark.compat
@every_family
def test_turns_are_one_conversation(family: str) -> None:
    model, prompt = attached(family), tokens(1, 50, seed=7)[0]
    questions = [tokens(1, length, seed=8) for length in (5, 1, 9)]
    cache, said = compressed(family, prompt), []
    for question in questions:
        said += [question[0], generate(model, question, cache, max_new_tokens=3)[0]]
    told = oracle(family)(prompt, kept_mask(cache, 0), torch.cat(said))
    at = 0
    for question, answer in zip(said[::2], said[1::2], strict=True):
        at += len(question)
        assert torch.equal(told[at - 1 : at + 2].argmax(-1), answer)
        at += len(answer)
    assert cache.get_seq_length(cache.compressible[0]) == 50 + at - 1  # the last token is said, not read


@searches
def test_what_was_generated_is_read_before_a_continuation(search: dict[str, int]) -> None:
    model, prompt, more = attached("llama"), tokens(1, 30)[0], tokens(1, 4, seed=9)
    cache, question = compressed("llama", prompt), tokens(1, 6, seed=10)
    answer = generate(model, question, cache, max_new_tokens=5, **search)
    ours = continuation(model, more, cache)
    told = continuation(model, torch.cat([question, answer, more], 1), compressed("llama", prompt))
    assert ours.shape == (1, 4, told.shape[-1])
    assert_logits_close(ours, told[:, -4:])


@searches
def test_what_was_generated_is_read_once_by_transformers(search: dict[str, int]) -> None:
    """Its last token, or a whole turn of beams, begins the next pass, whoever runs it; else the turn would be lost."""
    model, prompt, more = attached("llama"), tokens(1, 30), tokens(1, 4, seed=9)
    cache, question = prefill(model, prompt), tokens(1, 6, seed=10)
    answer = generate(model, question, cache, max_new_tokens=5, **search)
    by_hand, ids = cache.fork(), torch.cat([prompt, question, answer, more], 1)
    said = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=3)
    read = by_hand.get_seq_length()
    model(torch.cat([ids, said[:, -3:]], 1)[:, read:-1], past_key_values=by_hand)
    told = plain("llama")(torch.cat([said, more], 1)).logits[:, -4:]
    for each in (cache, by_hand):
        assert_logits_close(continuation(model, torch.cat([said[:, -1:], more], 1), each)[:, 1:], told)
    generate(model, question, cache := prefill(model, prompt), max_new_tokens=5, **search)
    with pytest.raises(UserError, match=r"yet to read the last \d+ tokens of the last turn: let input_ids begin with"):
        model(torch.full((1, 12), 96), past_key_values=cache)


@pytest.mark.parametrize("lengths", [(6, 6), (6, 2)])
def test_what_transformers_read_is_remembered(lengths: tuple[int, int]) -> None:
    model, prompts = attached("llama"), [tokens(1, n)[0] for n in (30, 19)]
    questions, more = [tokens(1, length, seed=11)[0] for length in lengths], tokens(2, 3, seed=12)
    ids, mask = padded(questions)
    cache = compressed("llama", *prompts)
    full = torch.cat([padded(prompts)[1], mask], 1)
    answer = model.generate(ids, attention_mask=full, past_key_values=cache, max_new_tokens=4, do_sample=False)[:, 6:]
    ours = continuation(model, torch.cat([answer[:, -1:], more], 1), cache)
    for row, question in enumerate(questions):
        said = torch.cat([question, answer[row], more[row]])[None]
        told = continuation(model, said, compressed("llama", prompts[row]))
        assert_logits_close(ours[row], told[0, -4:])


def test_cropping_generated_tokens() -> None:
    model, said = attached("llama"), tokens(2, 9, seed=13)
    caches = [compressed("llama", tokens(1, 30)[0], tokens(1, 14)[0]) for _ in range(2)]
    logits = continuation(model, said, caches[0])
    caches[0].crop(-5)
    continuation(model, said[:, :4], caches[1])
    assert_logits_close(continuation(model, said[:, 4:], caches[0]), logits[:, 4:])
    assert_logits_close(continuation(model, said[:, 4:], caches[1]), logits[:, 4:])
    for count in (3, -10):
        with pytest.raises(UserError, match=rf"crop\({count}\): only the 9 tokens read after compression"):
            caches[0].crop(count)


def test_a_row_ends_at_eos_and_the_conversation_goes_on() -> None:
    model, prompts = attached("llama"), [tokens(1, 33)[0], tokens(1, 25)[0]]
    question, more = tokens(2, 4, seed=14), tokens(2, 2, seed=15)
    free = generate(model, question, compressed("llama", *prompts), max_new_tokens=6)
    eos, never = int(free[0, 2]), 7
    assert eos not in free[0, :2].tolist() + free[1].tolist()
    assert never not in free
    cache = compressed("llama", *prompts)
    ours = generate(model, question, cache, max_new_tokens=6, eos_token_id=[eos, never], pad_token_id=0)
    assert ours.tolist() == [[*free[0, :3].tolist(), 0, 0, 0], free[1].tolist()]
    second = generate(model, more, cache, max_new_tokens=6)
    for row, spoken in enumerate((free[0, :3], free[1])):
        alone = compressed("llama", prompts[row])
        said = torch.cat([question[row], spoken, more[row]])[None]
        assert torch.equal(generate(model, said, alone, max_new_tokens=6)[0], second[row])
    stopped = generate(model, question[:1], compressed("llama", prompts[0]), max_new_tokens=6, eos_token_id=eos)
    assert torch.equal(stopped, free[:1, :3])


def test_beams_end_at_eos_and_the_conversation_goes_on() -> None:
    model, question, more = attached("llama"), tokens(2, 4, seed=14), tokens(2, 2, seed=15)
    prompts = [tokens(1, 33)[0], tokens(1, 25)[0]]
    free = generate(model, question, compressed("llama", *prompts), max_new_tokens=6, num_beams=2)
    for eos in free[1].tolist():
        cache, settings = compressed("llama", *prompts), {"eos_token_id": eos, "pad_token_id": 0}
        ended = generate(model, question, cache, max_new_tokens=6, num_beams=2, **settings)
        length = int((ended[1] != 0).sum())
        if length < 6 and eos not in ended[0]:
            break
    assert int(ended[1, length - 1]) == eos
    assert not ended[1, length:].any()
    assert (ended[0] != 0).all()
    second = generate(model, more, cache, max_new_tokens=3)
    for row in (0, 1):
        said = torch.cat([question[row], ended[row][ended[row] != 0], more[row]])[None]
        assert torch.equal(generate(model, said, compressed("llama", prompts[row]), max_new_tokens=3)[0], second[row])


def test_stop_is_called_after_every_token_and_ends_its_row() -> None:
    model, question, asked = attached("llama"), tokens(2, 4), []

    def stop(generated: Tensor) -> Tensor:
        asked.append(generated.clone())
        return torch.tensor([generated.shape[1] >= 2, generated.shape[1] >= 4])

    free = generate(model, question, compressed("llama", *tokens(2, 30)), max_new_tokens=6)
    ours = generate(model, question, compressed("llama", *tokens(2, 30)), max_new_tokens=6, stop=stop, pad_token_id=0)
    assert ours.tolist() == [[*free[0, :2].tolist(), 0, 0], free[1, :4].tolist()]
    assert [said.shape[1] for said in asked] == [1, 2, 3, 4]
    assert torch.equal(asked[-1], ours)


def test_drawing_is_repeatable_and_follows_the_distribution() -> None:
    model, question = attached("llama"), tokens(1, 4)
    cache = compressed("llama", tokens(1, 30)[0])
    probabilities = continuation(model, question, cache.fork())[0, -1].mul(1 / 1.5).softmax(-1)
    cache.batch_repeat_interleave(1500)

    def draw(**settings: Any) -> Any:
        same, whole = question.expand(1500, -1), {"temperature": 1.5, "top_k": 0}
        return generate(model, same, cache.fork(), max_new_tokens=1, do_sample=True, **{**whole, **settings})[:, 0]

    assert torch.equal(draw(seed=3), draw(seed=3))
    assert not torch.equal(draw(seed=3), draw(seed=4))
    order = probabilities.argsort(descending=True)
    nucleus = order[: int((probabilities[order].cumsum(0) < 0.7).sum()) + 1]
    top = order[:3]
    both = top[probabilities[top].cumsum(0) - probabilities[top] < 0.5 * probabilities[top].sum()]
    for settings, allowed in (
        ({}, order),
        ({"top_k": 3}, top),
        ({"top_p": 0.7}, nucleus),
        ({"top_k": 3, "top_p": 0.5}, both),
        ({"top_k": 1}, order[:1]),
        ({"top_p": 1e-6}, order[:1]),
    ):
        expected = torch.zeros_like(probabilities).index_copy_(0, allowed, probabilities[allowed])
        expected = expected / expected.sum()
        seen = torch.bincount(draw(seed=5, **settings), minlength=len(expected)) / 1500
        assert (seen[expected == 0] == 0).all()
        assert ((seen - expected).abs() <= 5 * (expected / 1500).sqrt() + 1e-3).all()


def poisoned(after: int) -> PreTrainedModel:
    """A model whose output is NaN after so many forward passes, reading the prompt included."""
    model, passes = attach(build("llama")), []

    def poison(module: PreTrainedModel, args: tuple[Any, ...], output: Any) -> Any:
        passes.append(0)
        output.logits[:] = torch.nan if len(passes) > after else output.logits
        return output

    model.register_forward_hook(poison)
    return model


@searches
def test_nan_in_the_output_ends_the_run(search: dict[str, int]) -> None:
    with pytest.raises(RunError, match="NaN after 0 new tokens"):
        generate(model := poisoned(1), tokens(2, 3), prefill(model, tokens(2, 9)), max_new_tokens=4, **search)
    steps = 4 if search else 16  # where it is looked for
    with pytest.raises(RunError, match=f"NaN after {steps} new tokens"):
        generate(model := poisoned(5), tokens(2, 3), prefill(model, tokens(2, 9)), max_new_tokens=40, **search)
    with pytest.raises(RunError, match="NaN after 5 new tokens"):
        generate(model := poisoned(6), tokens(2, 3), prefill(model, tokens(2, 9)), max_new_tokens=6, **search)
