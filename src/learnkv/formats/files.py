"""Reading and writing files: shipped tables, atomic writes, and one-line errors."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkv.errors import UserError

TABLES = Path(__file__).resolve().parents[1] / "reference" / "tables"


def locate(path: str, shipped: str) -> Path:
    """The file of a policy's argument: a path, or `reference` for the reference model's file `shipped`."""
    file = Path(path).expanduser()
    return TABLES / shipped if path == "reference" and not file.exists() else file


def read_text(path: str | Path) -> str:
    """Text of a file. Raises UserError where it is missing or not text."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def read_json(path: str | Path) -> Any:
    """Content of a JSON file. Raises UserError where it is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: expected JSON: {error}") from None


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that replaces `path` at the end of the block.

    On an error the temporary file is removed and the old file stays unchanged.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def output_file(path: str | Path) -> Iterator[Path]:
    """`atomic_write` of a file in a folder that is created where it is missing.

    Raises:
        UserError: the path cannot be written.
    """
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            yield part
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file; returns its path. Raises UserError as `output_file` does."""
    with output_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


def make_folder(path: Path, key: str) -> Path:
    """Create a folder where it is missing. Raises UserError, naming the argument `key`, where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{key}={path}: expected a folder that can be written ({error})") from None
    return path


def table(path: str | Path, rows: Sequence[Sequence[Any]], what: str) -> Tensor:
    """Rows of numbers as a tensor [L, H], float64. Raises UserError for ragged rows and for non-finite numbers."""
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise UserError(f"{path}: expected a row of {what} per layer, each of the same length; got {sorted(widths)}")
    for layer, row in enumerate(rows):
        for head, value in enumerate(row):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UserError(f"{path}: expected numbers, layer {layer} has {value!r} for head {head}")
    numbers = torch.tensor(rows, dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise UserError(f"{path}: expected finite numbers")
    return numbers
