"""Where a prompt is cut, when an answer has ended, and what it scores."""

from random import Random
from typing import Any

import pytest
import torch
from support.models import Loaded
from transformers import PreTrainedTokenizerBase

from learnkv.data.sample import Sample
from learnkv.evaluation.tasks import answers
from learnkv.evaluation.tasks.answers import Answers, EndOfAnswer, eos_tokens, loops, tokenised
from learnkv.evaluation.tasks.base import Prompt, pad
from learnkv.inference.generate import generate
from learnkv.inference.prefill import prefill

TEMPLATE = "{{ bos_token }}user: {{ messages[0]['content'] }}\nreply:"


def sample(*found: str, limit: int = 64, metric: str = "all", prefix: str = " It is") -> Sample:
    return Sample("Red is 123. Blue is 45.", "\nWhat is red?", prefix, list(found), "niah_single_1", limit, metric)


def prompt_of(one: Sample, setting: str, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    (prompt,) = tokenised([(7, one)], setting, 64, tokenizer, haystack="noise")
    return prompt


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids)


def test_the_question_is_read_after_compression_or_before(
    loaded: Loaded,
) -> None:
    _, tokenizer = loaded
    agnostic = prompt_of(sample("123"), "query_agnostic", tokenizer)
    aware = prompt_of(sample("123"), "query_aware", tokenizer)
    assert text(tokenizer, agnostic.prefill_ids) == "Red is 123. Blue is 45."
    assert text(tokenizer, agnostic.suffix_ids) == "\nWhat is red? It is"
    assert text(tokenizer, aware.prefill_ids) == "Red is 123. Blue is 45.\nWhat is red?"
    assert text(tokenizer, aware.suffix_ids) == " It is"
    assert agnostic.prefill_ids + agnostic.suffix_ids == aware.prefill_ids + aware.suffix_ids
    assert agnostic.room == len(agnostic.prefill_ids) + len(agnostic.suffix_ids) + 64
    assert agnostic.digest != aware.digest


def test_without_a_prefix_the_last_token_of_the_question_waits(
    loaded: Loaded,
) -> None:
    _, tokenizer = loaded
    aware = prompt_of(sample("123", prefix=""), "query_aware", tokenizer)
    assert text(tokenizer, aware.prefill_ids + aware.suffix_ids) == "Red is 123. Blue is 45.\nWhat is red?"
    assert len(aware.suffix_ids) == 1


def test_a_chat_template_stays_around_context_and_question(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    _, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    agnostic = prompt_of(sample("123"), "query_agnostic", tokenizer)
    assert text(tokenizer, agnostic.prefill_ids) == "<s>user: Red is 123. Blue is 45."
    assert text(tokenizer, agnostic.suffix_ids) == "\nWhat is red?\nreply: It is"


def ids(tokenizer: PreTrainedTokenizerBase, answered: str) -> list[int]:
    return tokenizer(answered).input_ids


def test_an_answer_ends_when_nothing_can_change_its_score(
    loaded: Loaded,
) -> None:
    _, tokenizer = loaded
    end = EndOfAnswer(tokenizer, {1})
    assert not end(ids(tokenizer, "12, 3"), sample("12", "34"))
    assert end(ids(tokenizer, "12, 34"), sample("12", "34"))
    assert end(ids(tokenizer, "12, 3"), sample("12", "34", metric="part"))


@pytest.mark.parametrize(
    "answered",
    [
        "Let me look.\n\nHere it is:\n 1. red\n 2. it says",
        "first 12.5 and, second. Third, it",
        "no. no. no. no. no. It is",
    ],
)
def test_an_answer_is_never_cut_before_it_is_found(loaded: Loaded, answered: str) -> None:
    _, tokenizer = loaded
    end, whole = EndOfAnswer(tokenizer, {1}), ids(tokenizer, f"{answered} 98765.")
    until = next(n for n in range(1, len(whole) + 1) if end(whole[:n], sample("98765")))
    assert sample("98765").score(end.text(whole[:until])) == 1


def test_eos_and_the_token_limit_end_an_answer_and_what_follows_does_not_count(
    loaded: Loaded,
) -> None:
    _, tokenizer = loaded
    end = EndOfAnswer(tokenizer, {1})
    answered = [*ids(tokenizer, "1"), 1, *ids(tokenizer, "7")]
    assert end.text(end.cut(answered, sample("7"))) == "1"
    assert end(end.cut(answered, sample("7")), sample("7"))
    limited = end.cut(ids(tokenizer, "1 2 3 7"), sample("7", limit=3))
    assert len(limited) == 3
    assert end(limited, sample("7", limit=3))
    assert not end(ids(tokenizer, "1"), sample("7"))


@pytest.mark.parametrize("period", [1, 2, 7, 24])
def test_a_loop_is_three_times_the_same_and_long(period: int) -> None:
    start, turn = [90, 91], list(range(period))
    least = max(32, 3 * period)
    answered = start + turn * (-(-least // period) + 1)
    assert not loops(answered[: 2 + least - 1])
    assert loops(answered[: 2 + least])
    broken = answered[: 2 + least]
    broken[-period - 1] = 77
    assert not loops(broken)


def test_answers_are_not_loops(loaded: Loaded) -> None:
    _, tokenizer = loaded
    numbers = "first 6976604, second 6976604, third 6976604, fourth 6976604, fifth 6976604."
    for answered in ("9" * 31, numbers, "00000000-0000-4000-8000-0000", " ".join(str(n) for n in range(60))):
        tokens = ids(tokenizer, answered)
        assert not any(loops(tokens[:n]) for n in range(len(tokens) + 1))


def test_eos_tokens_of_a_model(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    assert eos_tokens(model) == {1}
    monkeypatch.setattr(model.generation_config, "eos_token_id", [3, 4])
    assert eos_tokens(model) == {3, 4}
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    assert eos_tokens(model) == set()


def test_scores_are_shares_of_the_answers_and_finished_rows_leave(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    samples = [sample("12", "34", "56", limit=30), sample("12", "34", metric="part"), sample("99", limit=11)]
    prompts = [prompt_of(one, "query_agnostic", tokenizer) for one in samples]
    script = [
        ids(tokenizer, text) for text in ("56 and no more of it, 12." + " x" * 40, "34", "9 8 7 6 5 4 3 2 1 99 99")
    ]
    script = [row + [1] * (60 - len(row)) for row in script]
    asked: list[Any] = []
    counts: list[int] = []

    def scripted(
        model: Any, answered: Any, cache: Any, mask: Any, *, max_new_tokens: Any, earlier: Any, **settings: Any
    ) -> Any:
        assert settings == answers.GREEDY
        assert earlier == sum(counts)
        first, rows = not asked, [row for row in range(3) if len(asked) < (4, 1, 2)[row]]
        if first:
            assert mask.sum(-1).tolist() == [len(prompt.suffix_ids) for prompt in prompts]
        else:
            assert answered.tolist() == [[script[row][earlier - 1]] for row in rows]
        assert len(cache.prompt_lengths) == len(rows)
        assert cache.pending is None
        asked.append(rows)
        counts.append(max_new_tokens)
        return torch.tensor([script[row][earlier : earlier + max_new_tokens] for row in rows])

    monkeypatch.setattr(answers, "generate", scripted)
    cache = prefill(model, *pad([prompt.prefill_ids for prompt in prompts], "left", model.device))
    records, _ = Answers(prompts, tokenizer).measure(model, prompts, cache)
    assert asked == [[0, 1, 2], [0, 2], [0], [0]]
    assert counts == [8, 8, 8, 6]  # no more than the longest limit of the rows that are left
    assert [one["score"] for one in records] == pytest.approx([200 / 3, 100, 0])


def test_rounds_say_what_one_call_of_generate_says(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompts = [prompt_of(sample("zz", limit=29), "query_agnostic", tokenizer)]
    cache = prefill(model, *pad([prompt.prefill_ids for prompt in prompts], "left", model.device))
    records, _ = Answers(prompts, tokenizer).measure(model, prompts, cache.fork())
    whole = generate(model, torch.tensor([prompts[0].suffix_ids]), cache, max_new_tokens=29)
    assert records[0]["answer"] == tokenizer.decode(whole[0], skip_special_tokens=True)
    assert whole.shape[1] == 29


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.3}, {"min_new_tokens": 21}, {"no_repeat_ngram_size": 2}])
def test_rounds_follow_the_generation_config_as_one_call_does(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, settings: Any
) -> None:
    model, tokenizer = loaded
    free = [prompt_of(sample("zz", limit=29), "query_agnostic", tokenizer)]
    for name, value in settings.items():
        monkeypatch.setattr(model.generation_config, name, value)
    cache = prefill(model, *pad([prompt.prefill_ids for prompt in free], "left", model.device))
    records, _ = Answers(free, tokenizer).measure(model, free, cache.fork())
    whole = generate(model, torch.tensor([free[0].suffix_ids]), cache, max_new_tokens=29)
    assert records[0]["answer"] == tokenizer.decode(whole[0], skip_special_tokens=True)


def test_a_batch_says_what_each_prompt_says_alone(loaded: Loaded) -> None:
    model, tokenizer = loaded
    contexts = ["Red is 123.", "Red is 123. Blue is 45. Green is 6, and more of it.", "Red."]
    many = [Sample(one, "\nWhat" + " is red" * n, " It", ["zz"], "t", 12) for n, one in enumerate(contexts, 1)]
    prompts = [prompt_of(one, "query_agnostic", tokenizer) for one in many]
    family = Answers(prompts, tokenizer)

    def answered(some: list[Prompt]) -> list[str]:
        cache = prefill(model, *pad([prompt.prefill_ids for prompt in some], "left", model.device))
        return [one["answer"] for one in family.measure(model, some, cache)[0]]

    together = answered(prompts)
    assert together == [answered([prompt])[0] for prompt in prompts]
    assert len(set(together)) == 3


def test_rows_that_say_about_as_much_are_measured_together(
    loaded: Loaded,
) -> None:
    _, tokenizer = loaded
    many = [sample("1" * 30), sample("1"), sample("1" * 20), sample("22")]
    family = Answers([prompt_of(one, "query_agnostic", tokenizer) for one in many], tokenizer)
    assert [len(p.sample.answers[0]) for p in sorted(family.prompts, key=family.effort)] == [1, 2, 20, 30]


def test_padding_goes_to_one_side() -> None:
    ids, mask = pad([[5, 6], [7]], "left", torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [0, 7]]
    assert mask.tolist() == [[True, True], [False, True]]
    ids, mask = pad([[5, 6], [7]], "right", torch.device("cpu"))
    assert ids.tolist() == [[5, 6], [7, 0]]
    assert mask.tolist() == [[True, True], [True, False]]


def test_batches_of_unequal_prompts_have_little_padding(loaded: Loaded) -> None:
    _, tokenizer = loaded
    random = Random(0)
    prompts = [
        Prompt(
            "a", 4096, "query_agnostic", n, [1] * random.randint(200, 4000), [1], sample("x" * random.randint(1, 40))
        )
        for n in range(64)
    ]
    family = Answers(prompts, tokenizer)
    ordered = sorted(family.prompts, key=family.effort)
    batches = [[len(prompt.prefill_ids) for prompt in ordered[at : at + 4]] for at in range(0, 64, 4)]
    slots = sum(len(batch) * max(batch) for batch in batches)
    assert 1 - sum(map(sum, batches)) / slots < 0.08  # 0.29 where they are ordered by their answers
