import ast
import inspect
import re
from dataclasses import fields
from types import ModuleType

import pytest

from learnkv.data import retrieval_text, ruler_text
from learnkv.data.haystack import NOISE, docstrings, essay, held_out_docstrings, sentences
from learnkv.data.retrieval import NEXT_WORDS, Episode, Retrieval, count_words
from learnkv.data.ruler_text import NeedleWording
from learnkv.data.words import split_of
from learnkv.errors import UserError


def episodes(kind: str, length: int = 220, count: int = 20, **options: int) -> list[Episode]:
    return [Retrieval(length, kinds={kind: 1}, **options).episode(index) for index in range(count)]


@pytest.mark.parametrize("kind", Retrieval.KINDS)
def test_an_episode_fills_its_length_and_depends_on_seed_and_index(kind: str) -> None:
    made = episodes(kind)
    assert made == episodes(kind)
    assert made != episodes(kind, seed=1)
    assert len({episode.context for episode in made}) == len(made)
    for episode in made:
        assert episode.kind == kind
        assert 1 <= len(episode.continuations) <= 4
        # One unit more would not have fitted: the longest is a fact of seven words.
        assert 213 <= count_words(episode.context) <= 220


@pytest.mark.parametrize("kind", ["needle", "crowd", "codes", "values", "chain", "span"])
def test_every_part_of_an_answer_stands_in_the_context(kind: str) -> None:
    for episode in episodes(kind):
        for question, answer in episode.continuations:
            assert question.startswith("\n")
            assert answer.startswith(" ")
            told = answer.strip()
            if kind == "span":
                assert question.split(": ")[-1].split("? ")[-1] + answer in " " + episode.context
            else:
                parts = re.split(r",? ", told.removesuffix("."))
                places = [episode.context.find(part) for part in parts]
                assert -1 not in places
                assert places == sorted(places)
                assert {split_of(part) for part in parts} == {"train"}


def test_codes_are_asked_for_by_codes() -> None:
    code = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    for episode in episodes("codes", count=5):
        assert len(re.findall(code, episode.context)) >= 2 * len(episode.continuations)
        for question, answer in episode.continuations:
            assert re.search(code, question)
            assert re.fullmatch(f" {code}[.]", answer)


def test_a_fact_and_its_question_share_the_words_before_the_value() -> None:
    for fact in retrieval_text.FACTS:
        before = fact.sentence.split("{value}")[0].rstrip()
        assert fact.question.endswith(before)
        assert fact.question_all.endswith(before)


def test_next_text_continues_the_context() -> None:
    text = " ".join(" ".join(docstrings()).split())
    for episode in episodes("next", count=5):
        [(question, answer)] = episode.continuations
        assert question == ""
        assert len(answer.split()) == NEXT_WORDS
        joint = " ".join((episode.context + answer).split()[-NEXT_WORDS - 5 : -NEXT_WORDS + 5])
        assert joint in text + " " + text[:2000]


def test_a_tokenizer_may_count() -> None:
    made = Retrieval(900, count=len).episode(0)
    assert 900 - 100 < len(made.context) <= 900


def literals(module: ModuleType) -> set[tuple[str, str, str]]:
    """Runs of three words in the strings that a wording module is made of, docstrings aside."""
    tree = ast.parse(inspect.getsource(module))
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    runs = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            words = re.findall(r"[a-z]+", re.sub(r"\{.*?\}", " ", node.value).lower())
            runs |= {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
    return runs


def test_training_and_evaluation_share_no_wording() -> None:
    training, evaluation = literals(retrieval_text), literals(ruler_text)
    assert len(training) > 60
    assert len(evaluation) > 60
    assert not training & evaluation
    assert not set(retrieval_text.FILLER) & set(sentences(NOISE))
    told = " ".join(episode.context for kind in Retrieval.KINDS for episode in episodes(kind, count=10))
    shown = [NeedleWording(kind).needle("", "").split(" of ")[0] for kind in ("words", "numbers", "uuids")]
    assert len(fields(NeedleWording)) == 2
    assert not any(words in told for words in [*shown, "Copy "])


def test_the_evaluations_essays_are_not_training_text() -> None:
    seen = set(sentences(" ".join(docstrings())))
    long = [sentence for sentence in essay() if len(sentence) > 60]
    shared = [sentence for sentence in long if sentence in seen]
    # The help topics quote a docstring here and there.
    assert len(long) > 2000
    assert len(shared) < len(long) / 50


@pytest.mark.parametrize("kind", ["needle", "crowd", "codes"])
def test_where_not_all_facts_fit_there_are_fewer(kind: str) -> None:
    room = [Retrieval(length, len, kinds={kind: 1}) for length in (200, 4000)]
    short, long = ([one.episode(index) for index in range(20)] for one in room)
    assert all(0 < len(episode.context) <= 200 for episode in short)
    assert min(len(episode.continuations) for episode in short) < max(len(one.continuations) for one in long) == 4
    for episode in short:
        for question, answer in episode.continuations:
            assert answer.strip(" .") in episode.context, question


def test_one_line_says_what_is_wrong() -> None:
    with pytest.raises(UserError, match=r"kinds=.*expected weights, one above 0, of needle, crowd"):
        Retrieval(200, kinds={"riddle": 1})
    with pytest.raises(UserError, match="expected at least 1"):
        Retrieval(200, continuations=0)
    with pytest.raises(UserError, match="length=5: the facts of an episode take"):
        Retrieval(5, kinds={"chain": 1}).episode(0)


def test_held_out_docstrings_are_of_no_text_that_is_trained_on() -> None:
    held_out = held_out_docstrings()
    assert not set(held_out) & set(docstrings())
    assert len(held_out) > 300
    assert not any("pydoc_data" in text for text in held_out)
