"""Finished samples, appended to a file as they come, so that an interrupted run loses nothing."""

import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SLOT = ("policy", "task", "length", "setting", "index", "keep", "budget")
"""What a record is about; `fingerprint` says under which conditions it was found."""


class Store:
    """Records by fingerprint, backed by a file of JSON lines.

    A fingerprint covers everything that determines a record (model, prompt, policy, budget), so that records from
    earlier runs are used wherever they apply and nowhere else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        if path.is_file():
            self.records = {record["fingerprint"]: record for record in _complete_lines(path)}

    def __contains__(self, fingerprint: str) -> bool:
        return fingerprint in self.records

    def __getitem__(self, fingerprint: str) -> dict[str, Any]:
        return self.records[fingerprint]

    def forget_outdated(self, wanted: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
        """Drop records that are about the same slot as one of the wanted ones but were found under other conditions."""
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
            with replacing(self.path) as part:
                part.write_text("".join(map(_line, self.records.values())), encoding="utf-8")

    def add(self, records: Collection[dict[str, Any]]) -> None:
        """Append records; they are on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(map(_line, records))
        self.records.update((record["fingerprint"], record) for record in records)


def slot_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a record is about."""
    return tuple(record[key] for key in SLOT)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def _complete_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file whose last line may have been cut off."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place when it is complete."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    yield part
    part.replace(path)
