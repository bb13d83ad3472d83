import gzip
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learnkv.data.ruler import NEEDLES, NEW_TOKENS, TASKS, Ruler
from learnkv.data.sample import Sample
from learnkv.data.words import split_of
from learnkv.errors import UserError

GENERATED = [task for task in TASKS if not task.startswith("qa")]


class Letters:
    """A tokenizer of one token per three letters, with one special token in front."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [1] * ((len(text) + 2) // 3)}


def size(sample: Sample) -> int:
    count = Letters()
    after = count(sample.question + sample.answer_prefix, add_special_tokens=False)["input_ids"]
    return len(count(sample.context)["input_ids"]) + len(after) + sample.max_new_tokens


def names_in(text: str) -> list[str]:
    """Every key, value and variable name that a prompt shows, by its looks."""
    uuids = re.findall(r"\b[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}\b", text)
    rest = re.sub(r"\b[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b", " ", text)
    chained = [n for pair in re.findall(r"Copy (\w+) to (\w+)\.", rest) for n in pair if n != "12345"]
    told = re.findall(r"The secret \w+ of (\S+) is (\S+)\.", rest)
    return uuids + chained + [name for pair in told for name in pair]


@pytest.mark.parametrize("task", GENERATED)
@pytest.mark.parametrize("length", [1500, 5200])
def test_a_prompt_fills_its_length_and_holds_its_answers(task: str, length: int) -> None:
    for index in range(4):
        sample = Ruler(Letters(), length).sample(task, index)
        # One unit more would not have fitted: the largest is a needle of two UUIDs, or a common word's repetitions.
        assert length - 45 < size(sample) <= length
        assert sample.max_new_tokens == NEW_TOKENS[task]
        assert sample.task == task
        assert all(answer in sample.context for answer in sample.answers)
        assert sample.score(" ".join(sample.answers).upper()) == 1.0
        assert sample.score("") == 0.0


@pytest.mark.parametrize("task", GENERATED)
def test_a_prompt_is_a_function_of_seed_and_index(task: str) -> None:
    ruler = Ruler(Letters(), 1500, seed=3)
    first = [ruler.sample(task, index) for index in (0, 1)]
    again = [Ruler(Letters(), 1500, seed=3).sample(task, index) for index in (1, 0)]
    assert first == again[::-1]
    assert first[0].context != first[1].context
    assert Ruler(Letters(), 1500, seed=4).sample(task, 0).context != first[0].context


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*NEEDLES, "vt"]), st.integers(0, 10**6))
def test_splits_never_meet(task: str, index: int) -> None:
    for split in ("train", "eval"):
        sample = Ruler(Letters(), 1200, split=split).sample(task, index)
        names = names_in(sample.context)
        assert names
        assert {split_of(name) for name in names} == {split}
        assert {split_of(answer) for answer in sample.answers} == {split}


@pytest.mark.parametrize(
    ("task", "keys", "values"), [("niah_multikey_1", 4, 1), ("niah_multivalue", 1, 4), ("niah_multiquery", 4, 1)]
)
def test_as_many_needles_as_the_task_says(task: str, keys: int, values: int) -> None:
    sample = Ruler(Letters(), 1500).sample(task, 0)
    told = re.findall(r"The secret number of (\S+) is (\d{7})\.", sample.context)
    assert len({key for key, _ in told}) == keys
    assert len(told) == keys * values
    assert len(sample.answers) == (1 if task == "niah_multikey_1" else 4)
    asked = [key for key in dict(told) if key in sample.question]
    assert sorted(value for key, value in told if key in asked) == sorted(sample.answers)


def test_a_chain_is_told_in_order_and_its_example_is_another_one() -> None:
    sample = Ruler(Letters(), 1500).sample("vt", 0)
    links = re.findall(r"Copy (\w+) to (\w+)\.", sample.context.split("Now the pages.")[1])
    assert [target for _, target in links] == sample.answers
    assert len(links) == 5
    assert [source for source, _ in links[1:]] == sample.answers[:-1]
    assert links[0][0] in sample.question
    assert links[0][0].isdigit()
    assert len(links[0][0]) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1500, 6, 1), (5200, 30, 3)])
def test_common_words_come_back_as_often_as_the_task_says(length: int, often: int, seldom: int) -> None:
    sample = Ruler(Letters(), length).sample("cwe", 0)
    listed = re.findall(r"\d+\. ([a-z-]+)", sample.context.split("Now the list.")[1])
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, count in counts.items() if count == often} == set(sample.answers)
    assert {count for word, count in counts.items() if word not in sample.answers} == {seldom}


def test_the_three_most_frequent_code_words_are_the_answers() -> None:
    sample = Ruler(Letters(), 1500).sample("fwe", 0)
    told = [word for word in sample.context.split("\n")[1].split() if word != "..."]
    ranked = sorted(set(told), key=told.count, reverse=True)
    assert ranked[:3] == sample.answers
    assert told.count(ranked[2]) > told.count(ranked[3])


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"The town of Aa{i} lies on the river Bb{i}.",
                    "qas": [
                        {"question": f"Where is Aa{i}?", "answers": [{"text": f"Bb{i}"}], "is_impossible": False},
                        {"question": f"Who rules Aa{i}?", "answers": [], "is_impossible": True},
                    ],
                }
                for i in range(9)
            ]
        }
    ]
}
HOTPOTQA = [
    {
        "question": f"What joins {i}?",
        "answer": f"Cc{i}",
        "context": [[f"T{i}", [f"One {i}. ", f"Cc{i} joins."]], [f"U{i}", ["Nothing."]]],
        "supporting_facts": [[f"T{i}", 1]],
    }
    for i in range(6)
]


def test_questions_stand_among_other_documents(tmp_path: Path) -> None:
    squad, hotpotqa = tmp_path / "squad.json", tmp_path / "hotpotqa.json.gz"
    squad.write_text(json.dumps(SQUAD))
    hotpotqa.write_bytes(gzip.compress(json.dumps(HOTPOTQA).encode()))
    ruler = Ruler(Letters(), 200, qa=[str(squad), str(hotpotqa)])
    for task, questions in (("qa_1", 9), ("qa_2", 6)):
        samples = [ruler.sample(task, index) for index in range(questions)]
        assert len({sample.question for sample in samples}) == questions
        for sample in samples:
            assert size(sample) <= 200
            assert sample.answers[0] in sample.context
            assert sample.metric == "part"
            assert sample.context.count("Document ") > 1
        with pytest.raises(UserError, match=f"only {questions} questions fit"):
            ruler.sample(task, questions)


def test_one_line_says_what_is_missing(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"rows": []}')
    with pytest.raises(UserError, match="qa_1: needs a file in squad's layout, qa=FILE; given: none"):
        Ruler(Letters(), 1000).sample("qa_1", 0)
    with pytest.raises(UserError, match="expected JSON in SQuAD's or HotpotQA's layout"):
        Ruler(Letters(), 1000, qa=str(wrong)).sample("qa_1", 0)
    with pytest.raises(UserError, match="evaluation only"):
        Ruler(Letters(), 1000, qa=str(wrong), split="train").sample("qa_2", 0)
    with pytest.raises(UserError, match="task 'niah': expected one of niah_single_1, "):
        Ruler(Letters(), 1000).sample("niah", 0)
    with pytest.raises(UserError, match=r"vt: this prompt needs \d+ tokens of this tokenizer, length is 100"):
        Ruler(Letters(), 100).sample("vt", 0)


def test_a_haystack_file_replaces_the_essays(tmp_path: Path) -> None:
    file = tmp_path / "own.txt.gz"
    file.write_bytes(gzip.compress(b"Only these words\nare here. And these too."))
    context = Ruler(Letters(), 700, haystack=str(file)).sample("niah_single_2", 0).context.split("\n")[1]
    context = re.sub(r"The secret number of \S+ is \d+\. ?", "", context)
    assert set(context.split()) <= {"Only", "these", "words", "are", "here.", "And", "too."}
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        Ruler(Letters(), 700, haystack=str(tmp_path / "empty.txt")).sample("niah_single_2", 0)


def test_another_template_asks_for_the_same_facts() -> None:
    """Keys, values and places are those of the usual template; of its words nothing is left."""
    for task in ("niah_single_2", "niah_multikey_2", "niah_multiquery"):
        usual, memo = (Ruler(Letters(), 1500, template=template).sample(task, 1) for template in ("secret", "memo"))
        assert memo.answers == usual.answers
        assert "secret" not in memo.context + memo.question + memo.answer_prefix
        told = dict(re.findall(r"whoever asks about (\S+) should be told (\d{7})\.", memo.context))
        asked = [key for key in told if key in memo.question]
        assert [told[key] for key in asked] == memo.answers or sorted(told[key] for key in asked) == sorted(
            memo.answers
        )
        assert 1500 - 45 < size(memo) <= 1500


@pytest.mark.parametrize(("language", "letters"), [("german", "äöüß"), ("greek", "αεου")])
def test_keys_may_be_words_of_another_language(language: str, letters: str) -> None:
    seen = set()
    for index in range(12):
        sample = Ruler(Letters(), 1500, keys=language).sample("niah_multikey_1", index)
        told = dict(re.findall(r"The secret number of (\S+) is (\d{7})\.", sample.context))
        assert len(told) == 4
        assert {split_of(key) for key in told} == {"eval"}
        assert [told[key] for key in told if key in sample.question] == sample.answers
        seen |= set("".join(told))
    assert set(letters) <= seen
    uuids = Ruler(Letters(), 1500, keys=language).sample("niah_multikey_3", 0)
    assert uuids == Ruler(Letters(), 1500).sample("niah_multikey_3", 0)


def test_the_depth_is_where_the_first_answer_is() -> None:
    generator = Ruler(Letters(), 6000)
    for task in ("niah_single_2", "niah_multikey_1", "niah_multivalue"):
        for index in range(8):
            sample = generator.sample(task, index)
            place = sample.context.index(sample.answers[0]) / len(sample.context)
            assert sample.depth is not None
            assert 100 * place == pytest.approx(sample.depth, abs=20)
    assert generator.sample("vt", 0).depth is None
