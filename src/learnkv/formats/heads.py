"""One number per kv head, the format of KVzip's head-level scores: `{"shape": [L, H], "score": [[…], …]}`."""

import json
from pathlib import Path

from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, table, write_text


def read(path: str | Path) -> Tensor:
    """The numbers [L, H], float64.

    Raises:
        UserError: no such file, another format, a shape that contradicts its `shape`.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("score"), list) or not content["score"]:
        raise UserError(f'{path}: expected head scores {{"shape": [layers, kv heads], "score": [[…], …]}}')
    rows = content["score"]
    if not all(isinstance(row, list) for row in rows):
        raise UserError(f"{path}: expected one list of scores per layer")
    numbers = table(path, rows, "scores")
    if content.get("shape", list(numbers.shape)) != list(numbers.shape):
        raise UserError(f"{path}: expected shape {content['shape']}, got {list(numbers.shape)}")
    return numbers


def write(path: str | Path, scores: Tensor) -> Path:
    """Write one number [L, H] per kv head."""
    assert scores.ndim == 2, scores.shape
    return write_text(path, json.dumps({"shape": list(scores.shape), "score": scores.tolist()}) + "\n")
