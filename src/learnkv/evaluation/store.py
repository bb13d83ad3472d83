"""Finished samples, appended to a file at once, so that an interrupted run loses none."""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from learnkv.formats.files import write_text

SLOT = ("policy", "metric", "task", "length", "setting", "index", "keep", "budget", "bytes_budget")
"""Keys that identify a sample; its `fingerprint` is a hash of the conditions under which it was measured."""


class Store:
    """Records by fingerprint, backed by a file of JSON lines.

    A fingerprint covers everything that determines a record (model, prompt, policy, budget), so that records of
    earlier runs are reused exactly where they apply.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        self.records: dict[str, dict[str, Any]] = {record["fingerprint"]: record for record in _complete_lines(text)}
        self._cut = text != "" and not text.endswith("\n")

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self.records

    def __getitem__(self, fingerprint: str) -> dict[str, Any]:
        return self.records[fingerprint]

    def forget_outdated(self, wanted: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
        """Drop records of a wanted slot that were measured under other conditions.

        Args:
            wanted: fingerprint and slot of every sample of this run.
        """
        fingerprints: set[str] = set()
        slots: set[tuple[Any, ...]] = set()
        for fingerprint, slot in wanted:
            fingerprints.add(fingerprint)
            slots.add(slot)
        self.records = {
            fingerprint: record
            for fingerprint, record in self.records.items()
            if fingerprint in fingerprints or slot_of(record) not in slots
        }
        if self.path.is_file():
            write_text(self.path, "".join(map(_line, self.records.values())))
            self._cut = False

    def add(self, records: Collection[dict[str, Any]]) -> None:
        """Append records to the file."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(["\n"] * self._cut + [_line(record) for record in records])
        self._cut = False
        self.records.update((record["fingerprint"], record) for record in records)


def slot_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """The values of `SLOT` in a record; None for what a foreign one lacks, which is then nobody's sample."""
    return tuple(record.get(key) for key in SLOT)


def _line(record: dict[str, Any]) -> str:
    """JSON in ASCII: answers may have characters that readers take for the end of a line."""
    return json.dumps(record) + "\n"


def _complete_lines(text: str) -> Iterator[dict[str, Any]]:
    """Records of a text whose last line may have been cut off; only line feeds separate them."""
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("fingerprint"), str):
            yield {**record, "metric": record.get("metric", "generated")}
