"""Tokens of a vocabulary after which a unit of text ends."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, get_args

from learnkv.errors import UserError
from learnkv.formats.files import read_json, write_text

Unit = Literal["sentence", "line", "paragraph"]
UNITS: tuple[Unit, ...] = get_args(Unit)


def read(path: str | Path) -> dict[str, list[int]]:
    """Token ids by unit. Raises UserError for anything but `{"sentence": [ids], "line": [ids], "paragraph": [ids]}`."""
    content = read_json(path)
    if not isinstance(content, dict) or set(content) != set(UNITS):
        raise UserError(f"{path}: expected a list of token ids for each of {', '.join(UNITS)}")
    for unit, ids in content.items():
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise UserError(f"{path}: expected token ids for {unit}")
    return {unit: content[unit] for unit in UNITS}


def write(path: str | Path, ends: Mapping[str, Iterable[int]]) -> Path:
    """Write token ids by unit."""
    return write_text(path, json.dumps({unit: list(ids) for unit, ids in ends.items()}) + "\n")
