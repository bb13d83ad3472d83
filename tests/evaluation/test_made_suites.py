"""Suites that are made: paraphrased needles, coreference in conversations, rules of a system message."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from support.models import Loaded

from learnkv.errors import UserError
from learnkv.evaluation import tasks
from learnkv.evaluation.config import EvalConfig
from learnkv.evaluation.tasks.base import Prompt
from learnkv.evaluation.tasks.choices import Choices
from learnkv.evaluation.tasks.coreference import ReplySample
from learnkv.evaluation.tasks.instructions import CASES, QUOTES, RULES, SHAPES, RuleSample, obedient, sampled_rules
from learnkv.evaluation.tasks.paraphrase import FACTS, NAMES, NameSample

LENGTH = 900


def load(loaded: Loaded, names: str, **keys: Any) -> list[Prompt]:
    config = EvalConfig(tasks=tuple(names.split(",")), **{"lengths": (LENGTH,), "samples": 3, **keys})
    return [prompt for family in tasks.load(config, loaded[1], None) for prompt in family.prompts]


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.lower()))


@pytest.mark.parametrize("fact", [fact for facts in FACTS.values() for fact in facts])
def test_a_question_has_no_word_in_common_with_its_needle(fact: tuple[str, str]) -> None:
    needle, question = fact
    assert not words(needle) & words(f"{question}\nName:") - {"name"}
    assert not words(question) & words(" ".join(NAMES))


def test_paraphrased_needles_are_hidden_and_one_is_asked_for(loaded: Loaded) -> None:
    for prompt in load(loaded, "paraphrase", setting=("query_agnostic", "query_aware")):
        sample = prompt.sample
        assert isinstance(sample, NameSample)
        assert len(sample.choices) == 4
        assert all(sample.context.count(name) == 1 for name in sample.choices)
        facts = {question: needle for needle, question in FACTS[sample.task]}
        assert facts[sample.question.strip()].format(name=sample.answers[0]) in sample.context
        assert LENGTH - 40 < prompt.room <= LENGTH


def test_the_first_name_of_an_output_counts() -> None:
    sample = NameSample("c", "q", "\nName:", ["Clara"], "t", 24, choices=("Bruno", "Clara"))
    scores = {output: sample.score(output) for output in (" Clara", " Clara, not Bruno", " Bruno or Clara", " nobody")}
    assert list(scores.values()) == [1, 1, 0, 0]
    assert [sample.complete(output) for output in (" Bru", " Bruno")] == [False, True]


def test_forced_paraphrases_read_the_names(loaded: Loaded) -> None:
    config = EvalConfig(tasks=("paraphrase",), lengths=(LENGTH,), samples=1, score="forced")
    (family,) = tasks.load(config, loaded[1], None)
    assert isinstance(family, Choices)
    assert {prompt.metric for prompt in family.prompts} == {"choices"}


@pytest.mark.parametrize("count", [2, 4])
def test_equal_requests_have_different_replies_and_one_is_asked_for(loaded: Loaded, count: int) -> None:
    for prompt in load(loaded, f"mrcr_{count}", samples=2):
        sample = prompt.sample
        assert isinstance(sample, ReplySample)
        request = r"the (\w+) reply to the request for a (\w+) about ([\w-]+),"
        ordinal, form, topic = re.findall(request, sample.question)[0]
        replies = re.findall(rf"User: Write a {form} about {topic}\.\nAssistant: (.*)", sample.context)
        assert len(set(replies)) == count
        assert replies[["first", "second", "third", "fourth"].index(ordinal)] == sample.answers[0]
        assert sample.answer_prefix in sample.question
        assert prompt.room <= LENGTH


def test_similarity_of_replies() -> None:
    sample = ReplySample("c", "q", "1234567", ["The red hen may sing."], "t", 96)
    assert sample.score(" The red hen may sing.\nUser: more") == 1
    assert sample.score(" The red hen may cry.\n") == pytest.approx(2 * 17 / 41)
    assert sample.score("") == 0
    assert [sample.complete(output) for output in ("\n The", " The red\n")] == [False, True]


def rule_sample(*rules: tuple[str, str]) -> RuleSample:
    return RuleSample("c", "q", "", ["a"], "t", 64, rules=rules)


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ("begin", '"Otter: hello"', "the otter"),
        ("twice", "An otter and an Otter", "An otter"),
        ("bracket", "An [Otter] swims", "An (otter)"),
        ("end", 'I saw an otter."', "An otter swims."),
        ("capitals", "AN OTTER, 2.", "AN oTTER"),
        ("small", "an otter, 2.", "An otter"),
        ("quotes", "“An otter.”", '"An otter'),
    ],
)
def test_rules_are_checked(rule: str, good: str, bad: str) -> None:
    assert rule_sample((rule, "otter")).score(f"  {good}\n") == 1
    assert rule_sample((rule, "otter")).score(bad) == 0
    assert rule_sample((rule, "otter")).score("  ") == 0
    assert rule in RULES


def test_the_share_of_rules_counts() -> None:
    assert rule_sample(("capitals", "a"), ("end", "otter"), ("quotes", "b")).score("AN OTTER.") == pytest.approx(2 / 3)


def test_every_set_of_rules_can_be_followed() -> None:
    for seed in range(200):
        rules = sampled_rules(random.Random(seed), 2 + seed % 2)
        names = [name for name, _ in rules]
        assert len(names) == len(set(names)) == 2 + seed % 2
        assert len({*names} & {*CASES}) < 2
        assert rule_sample(*rules).score(obedient(rules)) == 1
    assert {*RULES} == {*SHAPES, *CASES, *QUOTES}


def test_rules_stand_in_the_system_message_and_are_not_repeated(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}reply:"
    for template in (None, chat):
        monkeypatch.setattr(loaded[1], "chat_template", template)
        for prompt in load(loaded, "instructions", setting=("query_agnostic", "query_aware")):
            sample = prompt.sample
            assert isinstance(sample, RuleSample)
            assert sample.context.startswith("Pages:\n")
            begin = "[system] " if template else ""
            assert prompt.text.removeprefix("<s>").startswith(f"{begin}{sample.system}\n")
            assert all(word in sample.system or "{word}" not in RULES[name].text for name, word in sample.rules)
            assert not any(word in sample.question for _, word in sample.rules)
            assert sample.score(sample.gold) == 1
            assert LENGTH - 60 < prompt.room <= LENGTH


@pytest.mark.parametrize(
    ("rule", "bad"),
    [
        ("begin", "otterly"),
        ("begin", "An otter"),
        ("twice", "otter"),
        ("twice", "An otter and otters"),
        ("end", "otter swims"),
        ("end", "It is a cotter"),
        ("bracket", "[otters]"),
        ("capitals", "123"),
        ("small", "123"),
        ("quotes", '""'),
        ("quotes", '"An otter" swims'),
    ],
)
def test_what_only_resembles_a_rule_breaks_it(rule: str, bad: str) -> None:
    assert rule_sample((rule, "otter")).score(bad) == 0


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_written_as_it_is_checked(name: str) -> None:
    text, check, apply = RULES[name]
    assert ("{word}" in text) == (name in SHAPES)
    assert not check("These pages are about many things.", "otter")
    assert check(apply("These pages are about many things.", "otter"), "otter")


def test_pages_that_cannot_be_made_are_named(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"instructions_2: this prompt needs \d+ tokens of this tokenizer, length is"):
        load(loaded, "instructions_2", lengths=(120,))
    (empty := tmp_path / "essays.txt").write_text(" \n")
    (broken := tmp_path / "broken.txt").write_bytes(b"caf\xe9")
    for file, message in ((empty, "text"), (broken, "UTF-8"), (tmp_path / "none.txt", "none.txt")):
        with pytest.raises(UserError, match=message):
            load(loaded, "instructions_2", haystack=str(file))


def test_made_prompts_are_functions_of_seed_and_number(loaded: Loaded) -> None:
    names = "paraphrase_meaning,mrcr_2,instructions_2"
    few, many, other = (load(loaded, names, **keys) for keys in ({"samples": 1}, {"samples": 2}, {"seed": 7}))
    assert {prompt.digest for prompt in few} < {prompt.digest for prompt in many}
    assert not {prompt.digest for prompt in few} & {prompt.digest for prompt in other}
