"""Rows of a table file: JSON lines, csv or parquet; errors name the file and the line."""

import csv
import glob
import gzip
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from learnkv.errors import UserError
from learnkv.formats.files import parse_json

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
MISSING = ("nan", "NaN", "None", "null", "<NA>")
"""What programs write into a csv file for no value; as an answer it is typed ["None"]."""
Rows = Sequence[dict[str, Any]]


def suffix_of(name: str) -> str:
    """The ending of a file's name, before `.gz`."""
    return Path(name.removesuffix(".gz")).suffix


def read_rows(path: str) -> Rows:
    """The rows of a table, each a mapping from column to cell.

    Raises:
        UserError: a file that cannot be read, with the line where there is one.
    """
    kind = suffix_of(path)
    if kind == ".parquet":
        return _parquet(path)
    text = _text(path)
    rows = _csv(path, text) if kind == ".csv" else _json(path, text)
    if not rows:
        raise UserError(f"tasks={path}: expected rows, the file has none")
    return rows


def _text(path: str) -> str:
    try:
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if path.endswith(".gz") else content
    except (OSError, EOFError) as error:
        raise UserError(f"tasks={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"tasks={path}: line {line} is not UTF-8") from None


def _json(path: str, text: str) -> Rows:
    """JSON lines, or one list."""
    if suffix_of(path) == ".json" and text.lstrip().startswith("["):
        try:
            lines = [(number, row) for number, row in enumerate(parse_json(text), 1)]
        except (ValueError, RecursionError) as error:
            raise UserError(f"tasks={path}: expected JSON: {error}") from None
    else:
        lines = [
            (number, _json_line(path, number, line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]
    for number, row in lines:
        if not isinstance(row, dict):
            raise UserError(f"tasks={path}: line {number}: expected an object with the columns, got {str(row)[:60]}")
    return [row for _, row in lines]


def _json_line(path: str, number: int, line: str) -> Any:
    try:
        return parse_json(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"tasks={path}: line {number}: expected JSON: {error}") from None


def _csv(path: str, text: str) -> Rows:
    csv.field_size_limit(sys.maxsize)  # contexts are long
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(reader)
    except csv.Error as error:
        raise UserError(f"tasks={path}: line {reader.line_num}: {error}") from None
    header = reader.fieldnames or []
    if len(set(header)) < len(header):
        raise UserError(f"tasks={path}: the header has a column twice: {', '.join(header)}")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            than = "more" if None in row else "fewer"
            raise UserError(f"tasks={path}: row {number}: expected {len(header)} cells as in the header, got {than}")
    return [{column: None if cell in MISSING else cell for column, cell in row.items()} for row in rows]


def _parquet(path: str) -> Rows:
    try:
        table = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train")
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        reason = error.__cause__ or error
        raise UserError(f"tasks={path}: cannot be read: {(str(reason) or 'no content').splitlines()[0]}") from None
    return list(table)
