"""Samples of the page: a prompt's tokens, the correct answer, and what every policy kept and answered."""

from collections.abc import Iterable
from typing import Any

from learnkv.evaluation.html.tables import budget_words
from learnkv.evaluation.kept_entries import VIEW
from learnkv.evaluation.results import FULL, Record, kind_of, prompt_key


def samples(records: Iterable[Record], scored: bool = True) -> list[dict[str, Any]]:
    """The prompts whose records have views, in the order of the records.

    Args:
        scored: whether there are correct answers, so that scores mean something.
    """
    by_prompt: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if VIEW in record:
            by_prompt.setdefault(prompt_key(record), []).append(record)
    complete = (group for group in by_prompt.values() if any(record["policy"] == FULL for record in group))
    return [_sample(group, scored) for group in complete]


def _sample(records: list[Record], scored: bool) -> dict[str, Any]:
    (full,) = (record for record in records if record["policy"] == FULL)
    words = "" if kind_of(full) == "text" else f", {full['setting'].replace('_', '-')}, {kind_of(full)}"
    return {
        "title": f"{full['task']}, {full['length']:,} tokens{words}, prompt {full['index']}",
        "setting": full["setting"],
        "kind": kind_of(full),
        "tokens": full[VIEW]["tokens"],
        "after": full[VIEW]["after"],
        "expected": full.get("expected") if scored else None,
        "cut_tokens": full.get("cut_tokens", 0),
        "answers": [_answer(record, scored) for record in records],
    }


def _answer(record: Record, scored: bool) -> dict[str, Any]:
    """What a policy answered; of what was kept, `shape` and `kept` are None for the full cache."""
    view = {} if record["policy"] == FULL else record[VIEW]
    return {
        "policy": record["policy"],
        "budget": budget_words(record),
        "answer": record.get("answer"),
        "score": record["score"] if scored else None,
        "kl": record.get("kl"),
        "bytes": round(record["bytes"]),
        "bytes_full": round(record["bytes_full"]),
        "spent": record["spent"],
        "shape": view.get("shape"),
        "kept": view.get("kept"),
        "bits": view.get("bits"),
    }
