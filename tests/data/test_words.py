import random

from hypothesis import given
from hypothesis import strategies as st

from learnkv.data import words
from learnkv.data.words import SPLITS, split_of


@given(st.integers(0, 10**9), st.sampled_from(["words", "numbers", "uuids"]))
def test_drawn_keys_and_values_belong_to_their_split(seed: int, kind: str) -> None:
    for split in SPLITS:
        drawn = words.value(kind, random.Random(seed), split)
        assert split_of(drawn) == split
        if kind == "words":
            assert [split_of(part) for part in drawn.split("-")] == [split, split]


@given(st.integers(0, 10**9), st.integers(1, 7))
def test_variables_belong_to_their_split(seed: int, letters: int) -> None:
    for split in SPLITS:
        name = words.variable(random.Random(seed), split, letters=letters)
        assert split_of(name) == split
        assert len(name) == letters
        assert name.isupper()


def test_word_lists_of_the_splits_are_disjoint_and_large() -> None:
    for kind in ("adjective", "noun", "verb"):
        train, evaluation = (set(words.word_list(kind, split)) for split in SPLITS)
        assert not train & evaluation
        assert len(train) > 2 * len(evaluation) > 200


def test_the_split_is_stable() -> None:
    # A change here would let a shipped model have trained on what evaluation asks.
    assert [split_of(text) for text in ("apple", "tiger", "1234567", "7654321", "ABCDE")] == [
        "eval",
        "eval",
        "train",
        "eval",
        "train",
    ]


def test_taken_strings_are_not_drawn_again() -> None:
    rng = random.Random(0)
    taken: set[str] = set()
    drawn = [words.number(rng, "eval", taken, digits=2) for _ in range(15)]
    assert len(set(drawn)) == 15
    assert set(drawn) == taken
