"""One number per layer: budgets or errors as a JSON list, the first layer first."""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, table, write_text


def read(path: str | Path) -> Tensor:
    """The numbers [L], float64.

    Raises:
        UserError: no such file, no list of numbers, a number below 0, or nothing above it.
    """
    content = read_json(path)
    if not isinstance(content, list) or not content:
        raise UserError(f"{path}: expected a list of one number per layer, got {type(content).__name__}")
    numbers = table(path, [content], "numbers")[0]
    if bool((numbers < 0).any()) or not bool(numbers.sum() > 0):
        raise UserError(f"{path}: expected numbers of at least 0, one of them above it")
    return numbers


def write(path: str | Path, numbers: Sequence[float]) -> Path:
    """Write one number per layer."""
    return write_text(path, json.dumps(list(numbers)) + "\n")
