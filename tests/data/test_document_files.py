"""Documents of every format come in pieces that make up the text; what is broken is one line with file and line."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from learnkv.data import documents
from learnkv.data.documents import file_pieces, read_document, split
from learnkv.data.haystack import essay
from learnkv.data.ruler_qa import read_documents
from learnkv.data.text import text_contents, text_windows
from learnkv.errors import UserError


class Words:
    """A tokenizer of one token per character that begins prompts with none and notes its longest text."""

    bos_token_id, eos_token_id = None, 0
    longest = 0

    def __call__(self, text: Any, add_special_tokens: Any = True) -> Any:
        self.longest = max(self.longest, len(text))
        return {"input_ids": [1 + ord(character) for character in text]}

    def get_vocab(self) -> Any:
        return {"a": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(folder: Any, name: str, text: str) -> Any:
    """A file with one document in the format of its name."""
    file = folder / name
    row = {"text": text, "other": 1}
    if name.endswith(".parquet"):
        datasets.Dataset.from_list([row]).to_parquet(file)
        return file
    content = text if ".txt" in name else json.dumps([row] if file.suffix == ".json" else row)
    file.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return file


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a[1].txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_long_document_is_tokenised_in_pieces(
    name: Any, streaming: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE", 64)
    text = "".join(f"line {i} of a text with ünï\u2028códe\n" for i in range(50))
    tokenizer = Words()
    windows = text_windows(str(written(tmp_path, name, text)), tokenizer, 10, streaming=streaming)
    ids = [token for row in windows for token in row["input_ids"].tolist()]
    whole = [1 + ord(character) for character in text] + [0]
    assert ids == whole[: len(whole) // 10 * 10]
    assert tokenizer.longest <= 64


@pytest.mark.parametrize(
    ("text", "cuts"),
    [
        ("ab\ncd ef gh", ["ab\n", "cd ef gh"]),
        ("abcdef gh ijkl", ["abcdef gh", " ijkl"]),
        ("a" * 25, ["a" * 10, "a" * 10, "a" * 5]),
        ("", [""]),
        ("ab\n\n\ncd efgh", ["ab\n\n\n", "cd efgh"]),
    ],
)
def test_pieces_end_between_lines_or_words(text: Any, cuts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE", 10)
    pieces = list(split(text))
    assert [piece for piece, _ in pieces] == cuts
    assert [ends for _, ends in pieces] == [False] * (len(cuts) - 1) + [True]


GOOD = b'{"text": "fine"}\n'
BROKEN = {
    "empty": ("a.jsonl", b"", "no window of 8 tokens"),
    "blank": ("a.jsonl", b"\n \n", "no window of 8 tokens"),
    "empty text": ("a.txt", b"", "no window of 8 tokens"),
    "cut": ("a.jsonl", GOOD + b'\n{"text": "cut o', "a.jsonl, line 3: expected JSON: Unterminated string"),
    "cut list": ("a.json", b'[{"text": "a"}, {"te', "a.json: expected JSON"),
    "list": ("a.jsonl", GOOD + b'{"text": ["a"]}', "a.jsonl, line 2: expected text in text, got list"),
    "number": ("a.jsonl", b'{"text": 5}', "a.jsonl, line 1: expected text in text, got int"),
    "number in a list": ("a.json", b'[{"text": "a"}, {"text": 5.5}]', "a.json, entry 2: expected text in text, got fl"),
    "no object": ("a.jsonl", b"7\n", "a.jsonl, line 1: expected an object with text, got int"),
    "no column": ("a.jsonl", GOOD + b'{"body": "b"}', r"column='text': line 2 of .*a.jsonl has body"),
    "latin-1 lines": ("a.jsonl", GOOD + b'{"text": "caf\xe9"}', "a.jsonl, line 2: is not UTF-8"),
    "latin-1 text": ("a.txt", b"one\ntwo\ncaf\xe9\n", "a.txt, line 3: is not UTF-8"),
    "latin-1 compressed": ("a.txt.gz", gzip.compress(b"one\ncaf\xe9"), "a.txt.gz, line 2: is not UTF-8"),
    "cut compressed": ("a.txt.gz", gzip.compress(b"one" * 99)[:-9], "a.txt.gz: cannot be read"),
    "not compressed": ("a.jsonl.gz", GOOD, "a.jsonl.gz: cannot be read"),
    "half a surrogate": ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl, line 1: .* surrogate pair"),
    "nested": ("a.jsonl", b"[" * 100_000, "a.jsonl: expected JSON"),
    "no parquet": ("a.parquet", b"PAR1 nothing", "a.parquet: cannot be read"),
}


@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_broken_is_named(fault: Any, streaming: Any, tmp_path: Path) -> None:
    name, content, line = BROKEN[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=line) as caught:
        for _ in text_windows(str(tmp_path / name), Words(), 8, streaming=streaming):
            pass
    assert "\n" not in str(caught.value)


def test_parquet_of_numbers_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": 5}]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 0: expected text in text, got int"):
        text_windows(str(tmp_path / "a.parquet"), Words(), 8)


def test_rows_without_text_are_skipped(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": null}\n{"text": ""}\n\n{"text": "abcdefg"}\n')
    assert [row["input_ids"].tolist() for row in text_windows(str(file), Words(), 8)] == [[*range(98, 105), 0]]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfab")
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "ab"}')
    for name in ("a.txt", "a.jsonl"):
        assert list(file_pieces([str(tmp_path / name)], "text")) == [("ab", True)]


SQUAD = {"context": "The cat.", "qas": [{"question": "Who?", "answers": [{"text": "cat"}]}]}
HOTPOTQA = {"question": "Who?", "answer": "cat", "context": [["T", ["a."]]], "supporting_facts": [["T", 0]]}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"qas": [{"question": "Who?", "answers": []}]}, "question 1: expected an answer, got an empty list"),
        ({"qas": [{"question": "Who?", "answers": [{"text": ""}]}]}, "question 1: expected an answer, got a blank one"),
        ({"qas": [{"question": "Who?", "answers": [{"text": 5}]}]}, "question 1: expected an answer of text, got int"),
        ({"qas": [{"question": None, "answers": [{"text": "a"}]}]}, "question 1: expected text, got NoneType"),
        ({"context": 5}, "paragraph 1: expected text, got int"),
        ([{"answer": "\u200b"}], "question 1: expected an answer, got a blank one"),
        ([{"answer": ["cat"]}], "question 1: expected an answer of text, got list"),
        ([{"supporting_facts": [["Z", 0]]}], "question 1: none of its paragraphs has the title of a supporting fact"),
    ],
)
def test_questions_that_cannot_be_scored_are_one_line(content: Any, line: str, tmp_path: Path) -> None:
    data = [HOTPOTQA | content[0]] if isinstance(content, list) else {"data": [{"paragraphs": [SQUAD | content]}]}
    (tmp_path / "q.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"qa=.*q.json: {line}"):
        read_documents(str(tmp_path / "q.json"))


def test_a_row_with_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2: expected JSON: .*key 'text' twice"):
        list(file_pieces([str(tmp_path / "a.jsonl")], "text"))


def test_haystacks_and_questions_name_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one.\ncaf\xe9.")
    with pytest.raises(UserError, match=r"haystack=.*a.txt, line 2: is not UTF-8"):
        essay(str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"haystack=.*none.txt: cannot be read: No such file"):
        essay(str(tmp_path / "none.txt"))
    (tmp_path / "q.json").write_bytes(b'{"data": "caf\xe9"}')
    with pytest.raises(UserError, match=r"qa=.*q.json, line 1: is not UTF-8"):
        read_documents(str(tmp_path / "q.json"))
    (tmp_path / "d" / "a.txt").mkdir(parents=True)
    with pytest.raises(UserError, match=r"a.txt: cannot be read: Is a directory"):
        read_document(str(tmp_path / "d" / "a.txt"), "text")


def test_contents_are_hashes_without_paths(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder, "a.txt", "some text")
    x, y = (text_contents([str(tmp_path / folder / "*.txt")]) for folder in ("x", "y"))
    assert x == y != text_contents([str(written(tmp_path, "b.txt", "other text"))])
    assert text_contents(["someone/text"]) == ["someone/text"]


def test_a_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    assert len(text_windows(str(written(tmp_path, "a.txt", "some text")), Words(), 5)) == 2


def test_a_hub_id_without_network_fails_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("learnkv.formats.hub_network.hub_fault", lambda: "huggingface.co cannot be reached (timed out)")
    with pytest.raises(UserError, match=r"text someone/text: no such file, and huggingface.co cannot be reached"):
        text_windows("someone/text", Words(), 8)


def test_a_hub_id_that_was_never_downloaded_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"text nobody/nothing: no such file, and loading it from the hub failed"
    ) as caught:
        text_windows("nobody/nothing", Words(), 8)
    assert "\n" not in str(caught.value)
