"""Samples on disk: appended, read again after a cut, used only where they apply."""

import json
from pathlib import Path
from typing import Any

import pytest

from learnkv.evaluation.store import Store, slot_of


def record(fingerprint: str, policy: str = "snapkv", index: int = 0, score: float = 1.0) -> dict[str, Any]:
    about = {
        "policy": policy,
        "metric": "generated",
        "task": "vt",
        "length": 64,
        "setting": "query_agnostic",
        "index": index,
    }
    return {**about, "keep": 0.5, "budget": None, "score": score, "fingerprint": fingerprint}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    store.add([record("a"), record("b", index=1)])
    store.add([record("c", index=2)])
    again = Store(tmp_path / "samples.jsonl")
    assert [fingerprint in again for fingerprint in "abcd"] == [True, True, True, False]
    assert again["b"] == record("b", index=1)


def test_a_line_that_was_cut_off_is_done_again_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    Store(path).add([record("a"), record("b", index=1)])
    path.write_bytes(path.read_bytes()[:-20])
    store = Store(path)
    assert "a" in store
    assert "b" not in store
    store.forget_outdated([])
    store.add([record("b", index=1)])
    assert [one["fingerprint"] for one in lines(path)] == ["a", "b"]


def test_outdated_records_go_and_foreign_ones_stay(tmp_path: Path) -> None:
    store = Store(tmp_path / "samples.jsonl")
    store.add([record("old"), record("same", index=1), record("foreign", policy="adakv")])
    store.forget_outdated([("new", slot_of(record("new"))), ("same", slot_of(record("same", index=1)))])
    assert [one["fingerprint"] for one in lines(store.path)] == ["same", "foreign"]
    assert "old" not in store


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x1c", "\r", "\n", "\ud800"])
def test_an_answer_may_hold_any_character(tmp_path: Path, separator: Any) -> None:
    records = [{**record("a"), "answer": f"before{separator}after"}, record("b", index=1)]
    Store(tmp_path / "samples.jsonl").add(records)
    assert list(Store(tmp_path / "samples.jsonl").records.values()) == records
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2


def test_separators_that_an_earlier_version_left_in_a_line_do_not_cut_it(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(json.dumps({**record("a"), "answer": "x\u2028\x85y"}, ensure_ascii=False) + "\n5\n{}\n", "utf-8")
    assert list(Store(path).records) == ["a"]


def test_records_after_a_line_that_was_cut_off_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    Store(path).add([record("a"), record("b", index=1)])
    path.write_bytes(path.read_bytes()[:-20])
    Store(path).add([record("c", index=2)])
    assert list(Store(path).records) == ["a", "c"]


@pytest.mark.parametrize("line", ['{"fingerprint": {}}', '"fingerprint"', "[" * 100_000])
def test_lines_that_are_no_records_are_left_out(tmp_path: Path, line: str) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text(line + "\n")
    store = Store(path)
    store.forget_outdated([])
    assert not store.records


@pytest.mark.parametrize("separator", ["\u2028", "\u0085", "\x1c", "\n"])
def test_a_record_is_read_again_whatever_its_answer_and_keys(separator: str, tmp_path: Path) -> None:
    records = [{"fingerprint": "a", "answer": f"one{separator}two"}, {"fingerprint": "b", "answer": "three"}]
    Store(tmp_path / "samples.jsonl").add(records)
    again = Store(tmp_path / "samples.jsonl")
    assert [again[name]["answer"] for name in ("a", "b")] == [f"one{separator}two", "three"]
    again.forget_outdated([("new", slot_of(record("new")))])
    assert "a" in again
