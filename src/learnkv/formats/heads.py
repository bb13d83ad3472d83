"""One number per kv head, as KVzip's head-level scores are kept: `{"shape": [L, H], "score": [[…], …]}`."""

import json
from pathlib import Path

from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, table, write_text


def read(path: str | Path) -> Tensor:
    """The numbers [L, H], float64.

    Raises:
        UserError: no such file, another format, another shape than it says.
    """
    held = read_json(path)
    if not isinstance(held, dict) or not isinstance(held.get("score"), list) or not held["score"]:
        raise UserError(f'{path}: expected head scores {{"shape": [layers, kv heads], "score": [[…], …]}}')
    rows = held["score"]
    if not all(isinstance(row, list) for row in rows):
        raise UserError(f"{path}: expected one list of scores per layer")
    numbers = table(path, rows, "scores")
    if held.get("shape", list(numbers.shape)) != list(numbers.shape):
        raise UserError(f"{path}: says shape {held['shape']}, has {list(numbers.shape)}")
    return numbers


def write(path: str | Path, scores: Tensor) -> Path:
    """Write one number [L, H] per kv head."""
    assert scores.ndim == 2, scores.shape
    return write_text(path, json.dumps({"shape": list(scores.shape), "score": scores.tolist()}) + "\n")
