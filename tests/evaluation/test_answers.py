"""Where a prompt is cut, when an answer has ended, and what it scores."""

import pytest
import torch

from learnkv.data.sample import Sample
from learnkv.evaluation.tasks import answers
from learnkv.evaluation.tasks.answers import Answers, EndOfAnswer, eos_tokens, tokenised
from learnkv.evaluation.tasks.base import pad
from learnkv.generation import prefill

TEMPLATE = "{{ bos_token }}user: {{ messages[0]['content'] }}\nreply:"


def sample(*found, limit=64, metric="all", prefix=" It is"):
    return Sample("Red is 123. Blue is 45.", "\nWhat is red?", prefix, list(found), "niah_single_1", limit, metric)


def prompt_of(one, setting, tokenizer):
    (prompt,) = tokenised([(7, one)], setting, 64, tokenizer, haystack="noise")
    return prompt


def text(tokenizer, ids):
    return tokenizer.decode(ids)


def test_the_question_is_read_after_compression_or_before(loaded):
    _, tokenizer = loaded
    agnostic = prompt_of(sample("123"), "query_agnostic", tokenizer)
    aware = prompt_of(sample("123"), "query_aware", tokenizer)
    assert text(tokenizer, agnostic.read) == "Red is 123. Blue is 45."
    assert text(tokenizer, agnostic.then) == "\nWhat is red? It is"
    assert text(tokenizer, aware.read) == "Red is 123. Blue is 45.\nWhat is red?"
    assert text(tokenizer, aware.then) == " It is"
    assert agnostic.read + agnostic.then == aware.read + aware.then
    assert agnostic.room == len(agnostic.read) + len(agnostic.then) + 64
    assert agnostic.digest != aware.digest


def test_without_a_prefix_the_last_token_of_the_question_waits(loaded):
    _, tokenizer = loaded
    aware = prompt_of(sample("123", prefix=""), "query_aware", tokenizer)
    assert text(tokenizer, aware.read + aware.then) == "Red is 123. Blue is 45.\nWhat is red?"
    assert len(aware.then) == 1


def test_a_chat_template_stays_around_context_and_question(loaded, monkeypatch):
    _, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    agnostic = prompt_of(sample("123"), "query_agnostic", tokenizer)
    assert text(tokenizer, agnostic.read) == "<s>user: Red is 123. Blue is 45."
    assert text(tokenizer, agnostic.then) == "\nWhat is red?\nreply: It is"


def steps(end, rows):
    """When each row ends, as `generate` would ask."""
    said = torch.tensor(rows)
    return [end(said[:, :new]).tolist() for new in range(1, said.shape[1] + 1)]


def padded(tokenizer, *texts, length):
    rows = [tokenizer(one).input_ids for one in texts]
    return [row + tokenizer(" x").input_ids[:1] * (length - len(row)) for row in rows]


def test_an_answer_ends_when_all_of_it_is_found(loaded):
    _, tokenizer = loaded
    end = EndOfAnswer(tokenizer, [sample("12", "34"), sample("12", "34", metric="part"), sample("zz")], {1})
    rows = padded(tokenizer, "12, 34", "12 and", "12", length=12)
    done = steps(end, rows)
    assert done[3] == [False, True, False]  # looked at every fourth token
    assert done[7] == [True, True, False]
    assert end.ends == [8, 4, None]
    assert [one.score(said) for one, said in zip(end.samples, end.texts(torch.tensor(rows)), strict=True)] == [1, 1, 0]


def test_an_answer_is_never_cut_before_it_is_found(loaded):
    _, tokenizer = loaded
    said = "Let me look.\n\nHere it is:\n 1. red\n 2. it says 98765."
    rows = padded(tokenizer, said, length=60)
    end = EndOfAnswer(tokenizer, [sample("98765")], {1})
    steps(end, rows)
    assert end.samples[0].score(end.texts(torch.tensor(rows))[0]) == 1


def test_eos_and_the_token_limit_end_an_answer(loaded):
    _, tokenizer = loaded
    end = EndOfAnswer(tokenizer, [sample("7", limit=9), sample("7", limit=3)], {1})
    rows = padded(tokenizer, "1", "1", length=12)
    rows[0][4] = 1
    rows[0][5:] = rows[1][5:] = tokenizer("7").input_ids * 7
    done = steps(end, rows)
    assert end.ends == [5, 3]
    assert done[-1] == [True, True]
    assert all("7" not in said for said in end.texts(torch.tensor(rows)))  # what is said after the end does not count


def test_eos_tokens_of_a_model(loaded, monkeypatch):
    model, _ = loaded
    assert eos_tokens(model) == {1}
    monkeypatch.setattr(model.generation_config, "eos_token_id", [3, 4])
    assert eos_tokens(model) == {3, 4}
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert eos_tokens(model) == set()


def test_scores_are_shares_of_the_answers(loaded, monkeypatch):
    model, tokenizer = loaded
    samples = [sample("12", "34", "56"), sample("12", "34", metric="part"), sample("99")]
    prompts = [prompt_of(one, "query_agnostic", tokenizer) for one in samples]
    rows = torch.tensor(padded(tokenizer, "56 and 12.", "34", "9 9", length=16))

    def scripted(model, ids, cache, mask, *, max_new_tokens, stop):
        assert mask.sum(-1).tolist() == [len(prompt.then) for prompt in prompts]
        assert max_new_tokens == 64
        return rows

    monkeypatch.setattr(answers, "generate", scripted)
    records, _ = Answers(prompts, tokenizer).measure(model, prompts, None)
    assert [one["score"] for one in records] == pytest.approx([200 / 3, 100, 0])


def test_a_batch_says_what_each_prompt_says_alone(loaded):
    model, tokenizer = loaded
    contexts = ["Red is 123.", "Red is 123. Blue is 45. Green is 6, and more of it.", "Red."]
    many = [Sample(one, "\nWhat" + " is red" * n, " It", ["zz"], "t", 12) for n, one in enumerate(contexts, 1)]
    prompts = [prompt_of(one, "query_agnostic", tokenizer) for one in many]
    family = Answers(prompts, tokenizer)

    def said(some):
        cache = prefill(model, *pad([prompt.read for prompt in some], "left", model.device))
        return [one["answer"] for one in family.measure(model, some, cache)[0]]

    together = said(prompts)
    assert together == [said([prompt])[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_rows_that_say_about_as_much_are_neighbours(loaded):
    _, tokenizer = loaded
    many = [sample("1" * 30), sample("1"), sample("1" * 20), sample("22")]
    family = Answers([prompt_of(one, "query_agnostic", tokenizer) for one in many], tokenizer)
    assert [len(prompt.sample.answers[0]) for prompt in family.prompts] == [1, 2, 20, 30]


def test_padding_goes_to_one_side():
    ids, mask = pad([[5, 6], [7]], "left", torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[True, True], [False, True]]
    ids, mask = pad([[5, 6], [7]], "right", torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [7, 0]] and mask.tolist() == [[True, True], [True, False]]
