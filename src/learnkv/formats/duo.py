"""DuoAttention's head gates: a folder with `full_attention_heads.tsv` and `config.json`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from learnkv.errors import UserError
from learnkv.formats.files import read_json, read_text, table, write_text

GATES, CONFIG = "full_attention_heads.tsv", "config.json"


@dataclass(frozen=True)
class Pattern:
    """Gate of every kv head, and the tokens that streaming heads keep."""

    gates: Tensor
    """[L, H] float64 as stored, 1 for full attention; published gates overstep [0, 1] a little."""
    sink: int
    """First tokens that a streaming head keeps."""
    recent: int
    """Last tokens that a streaming head keeps."""
    config: Mapping[str, Any]
    """All of config.json."""


def read(folder: str | Path) -> Pattern:
    """The pattern in a folder.

    Raises:
        UserError: a file is missing or has another format.
    """
    folder = Path(folder).expanduser()
    lines = read_text(folder / GATES).splitlines()
    try:
        rows = [[float(word) for word in line.split("\t")] for line in lines if line]
    except ValueError as error:
        raise UserError(f"{folder / GATES}: expected numbers between tabs: {error}") from None
    config = read_json(folder / CONFIG)
    sink, recent = (_size(folder / CONFIG, config, key) for key in ("sink_size", "recent_size"))
    return Pattern(table(folder / GATES, rows, "gates"), sink, recent, config)


def _size(path: Path, config: object, key: str) -> int:
    size = config.get(key) if isinstance(config, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UserError(f"{path}: expected {key} as a whole number, got {size!r}")
    return size


def write(folder: str | Path, gates: Tensor, sink: int, recent: int, config: Mapping[str, Any] | None = None) -> Path:
    """Write gates [L, H]; `config` has further keys of config.json."""
    folder = Path(folder).expanduser()
    lines = ["\t".join(f"{gate:.18e}" for gate in row) for row in gates.double().tolist()]
    write_text(folder / GATES, "\n".join(lines) + "\n")
    write_text(folder / CONFIG, json.dumps({**(config or {}), "sink_size": sink, "recent_size": recent}))
    return folder
