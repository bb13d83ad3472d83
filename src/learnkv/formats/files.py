"""What the formats share: where a shipped file lies, and files whose faults are told in one line."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from learnkv.errors import UserError

TABLES = Path(__file__).resolve().parents[1] / "reference" / "tables"


def locate(path: str, shipped: str) -> Path:
    """The file that a policy's argument means: a path, or `reference` for the reference model's own `shipped`."""
    where = Path(path).expanduser()
    return TABLES / shipped if path == "reference" and not where.exists() else where


def read_text(path: str | Path) -> str:
    """Text of a file; UserError where it is missing or no text."""
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def read_json(path: str | Path) -> Any:
    """Content of a JSON file; UserError where it is none."""
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: expected JSON: {error}") from None


def write_text(path: str | Path, text: str) -> Path:
    """Write a file, in a folder that is made where it is missing."""
    where = Path(path).expanduser()
    try:
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(text, encoding="utf-8")
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return where


def table(path: str | Path, rows: Sequence[Sequence[Any]], what: str) -> Tensor:
    """Rows of numbers [L, H] as float64; UserError where they are ragged or not finite numbers."""
    widths = {len(row) for row in rows}
    if len(widths) != 1 or 0 in widths:
        raise UserError(f"{path}: expected a row of {what} per layer, each of the same length; got {sorted(widths)}")
    for layer, row in enumerate(rows):
        for head, one in enumerate(row):
            if isinstance(one, bool) or not isinstance(one, int | float):
                raise UserError(f"{path}: expected numbers, layer {layer} has {one!r} at {head}")
    held = torch.tensor(rows, dtype=torch.float64)
    if not bool(held.isfinite().all()):
        raise UserError(f"{path}: expected finite numbers")
    return held
