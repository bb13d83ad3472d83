"""Finished samples, appended to a file at once, so that an interrupted run loses none."""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from learnkv.formats.files import write_text

SLOT = ("policy", "metric", "task", "length", "setting", "index", "keep", "budget", "bytes_budget")
"""Keys that identify a sample; its `fingerprint` is a hash of the conditions under which it was measured."""


class Store:
    """Records by fingerprint, backed by a file of JSON lines, and by a shard of it per process while several write.

    A fingerprint covers everything that determines a record (model, prompt, policy, budget), so that records of
    earlier runs are reused exactly where they apply.

    Args:
        path: the file of all samples; shards are beside it.
        shard: number of the shard that records are added to; None: they are added to the file.
    """

    def __init__(self, path: Path, shard: int | None = None) -> None:
        self.path = path
        self.file = path if shard is None else path.with_name(f"{path.stem}.{shard}{path.suffix}")
        self.records: dict[str, dict[str, Any]] = {}
        self._cut = False
        self.read()

    def read(self) -> None:
        """Take the records of the file and of all shards."""
        for file in (self.path, *self.shards()):
            text = _text(file)
            self.records.update((record["fingerprint"], record) for record in _complete_lines(text))
            if file == self.file:
                self._cut = text != "" and not text.endswith("\n")

    def shards(self) -> list[Path]:
        """Files of the processes that write, or wrote until they were interrupted."""
        files = self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")
        return sorted(file for file in files if file.name.split(".")[-2].isdigit())

    def merge(self) -> None:
        """Write all records into the file, each once, and remove the shards."""
        self.read()
        self._write()

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
        self._write()

    def add(self, records: Collection[dict[str, Any]]) -> None:
        """Append records to the file, or to the shard."""
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(["\n"] * self._cut + [_line(record) for record in records])
        self._cut = False
        self.records.update((record["fingerprint"], record) for record in records)

    def _write(self) -> None:
        """Replace the file by the records in one step, then remove the shards."""
        shards = self.shards()
        if self.path.is_file() or shards:
            write_text(self.path, "".join(map(_line, self.records.values())))
            self._cut = False
        for shard in shards:
            shard.unlink()


def slot_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """The values of `SLOT` in a record; None for what a foreign one lacks, which is then nobody's sample."""
    return tuple(record.get(key) for key in SLOT)


def _text(file: Path) -> str:
    """Its content; nothing where there is none, or no more: the first process merges shards."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


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
