"""Rows of a table: JSON lines, csv or parquet files, or a hub data set; errors name the file and the line."""

import csv
import glob
import gzip
import io
import sys
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from learnkv.errors import UserError
from learnkv.formats.files import parse_json
from learnkv.formats.hub_network import check_hub

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
MISSING = ("nan", "NaN", "None", "null", "<NA>")
"""What programs write into a csv file for no value; as an answer it is typed ["None"]."""
LONGEST_LINE = 1 << 25
"""Bytes of a line of JSON: the longest documents of long-context benchmarks have half of it."""


class Row(NamedTuple):
    """A row of a table, and where it lies: the key and the file as typed, and the line."""

    where: str
    cells: Mapping[str, Any]

    def column(self, name: str) -> str:
        """Where the cell of a column lies, for errors."""
        return f"{self.where}, column {name}"

    def require(self, *columns: str) -> None:
        """Raise UserError where the row lacks one of these columns."""
        if missing := [column for column in columns if column not in self.cells]:
            raise UserError(f"{self.where}: expected the columns {', '.join(columns)}; {', '.join(missing)} missing")


def suffix_of(name: str) -> str:
    """The ending of a file's name, before `.gz`."""
    return Path(name.removesuffix(".gz")).suffix


def is_file(name: str) -> bool:
    """Whether a table is a local file."""
    return suffix_of(name) in FORMATS


def hub_rows(source: str, argument: str, **options: Any) -> list[Row]:
    """Rows of a hub data set, of the test split if no other is given.

    Args:
        argument: the key and its value as typed, for errors.
        options: of `datasets.load_dataset`.
    """
    try:
        check_hub(argument)
        rows = datasets.load_dataset(source, **{"split": "test", **options})
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"{argument}: loading it from the hub failed: {str(error).splitlines()[0]}") from None
    return [Row(f"{argument}: row {number}", row) for number, row in enumerate(rows, 1)]


def read_rows(path: str, key: str = "tasks") -> list[Row]:
    """The rows of a table file, each a mapping from column to cell.

    Args:
        key: of the command that the file was given with, for errors.

    Raises:
        UserError: a file that cannot be read or has no rows, with the line where there is one.
    """
    argument, kind = f"{key}={path}", suffix_of(path)
    if kind == ".parquet":
        return list(_parquet(path, argument))
    content = _content(path, argument)
    if kind == ".csv":
        rows = list(_csv(_text(content, argument), argument))
    elif kind == ".json" and content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        rows = list(_json(_text(content, argument), argument))
    else:
        rows = list(_json_lines(content, argument))
    if not rows:
        raise UserError(f"{argument}: expected rows, the file has none")
    return rows


def _content(path: str, argument: str) -> bytes:
    try:
        content = Path(path).expanduser().read_bytes()
        return gzip.decompress(content) if path.endswith(".gz") else content
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{argument}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _text(content: bytes, argument: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{argument}: line {line} is not UTF-8") from None


def _json(text: str, argument: str) -> Iterator[Row]:
    """One list of objects."""
    try:
        rows = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{argument}: expected JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield _object(row, f"{argument}: entry {number}")


def _json_lines(content: bytes, argument: str) -> Iterator[Row]:
    for number, line in enumerate(content.rstrip().split(b"\n") if content.strip() else [], 1):
        where = f"{argument}: line {number}"
        if len(line) > LONGEST_LINE:
            raise UserError(f"{where} has {len(line):,} bytes, expected at most {LONGEST_LINE:,}")
        if not line.strip():
            raise UserError(f"{where} is empty")
        try:
            row = parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{where} is not UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: expected JSON: {error}") from None
        yield _object(row, where)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the columns, got {str(row)[:60]}")
    return Row(where, row)


def _csv(text: str, argument: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # contexts are long
    reader = csv.reader(io.StringIO(text.rstrip("\r\n"), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{argument}: the header has a column twice: {', '.join(header)}")
        begin = reader.line_num + 1
        for cells in reader:
            where = f"{argument}: line {begin}"
            if not cells:
                raise UserError(f"{where} is empty")
            if len(cells) != len(header):
                than = "more" if len(cells) > len(header) else "fewer"
                raise UserError(f"{where}: expected {len(header)} cells as in the header, got {than}")
            row = zip(header, cells, strict=True)
            yield Row(where, {column: None if cell in MISSING else cell for column, cell in row})
            begin = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{argument}: line {reader.line_num}: {error}") from None


def _parquet(path: str, argument: str) -> Iterator[Row]:
    try:
        table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise UserError(f"{argument}: cannot be read: {(str(reason) or 'no content').splitlines()[0]}") from None
    for number, row in enumerate(table, 1):
        yield Row(f"{argument}: row {number}", row)
