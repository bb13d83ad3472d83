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
    """How much each kv head needs its whole cache, and what the others keep."""

    gates: Tensor
    """[L, H] float64 as stored: 1 needs everything; published ones overstep [0, 1] a little."""
    sink: int
    """First tokens that a streaming head keeps."""
    recent: int
    """Last tokens that a streaming head keeps."""
    config: Mapping[str, Any]
    """All of config.json."""


def read(folder: str | Path) -> Pattern:
    """The pattern in a folder.

    Raises:
        UserError: a file is missing or is not what its name says.
    """
    where = Path(folder).expanduser()
    lines = read_text(where / GATES).splitlines()
    try:
        rows = [[float(word) for word in line.split("\t")] for line in lines if line]
    except ValueError as error:
        raise UserError(f"{where / GATES}: expected numbers between tabs: {error}") from None
    config = read_json(where / CONFIG)
    sink, recent = (_size(where / CONFIG, config, key) for key in ("sink_size", "recent_size"))
    return Pattern(table(where / GATES, rows, "gates"), sink, recent, config)


def _size(path: Path, config: object, key: str) -> int:
    size = config.get(key) if isinstance(config, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise UserError(f"{path}: expected {key} as a whole number, got {size!r}")
    return size


def write(folder: str | Path, gates: Tensor, sink: int, recent: int, config: Mapping[str, Any] | None = None) -> Path:
    """Write gates [L, H]; `config` holds what else config.json should say."""
    where = Path(folder).expanduser()
    lines = ["\t".join(f"{gate:.18e}" for gate in row) for row in gates.double().tolist()]
    write_text(where / GATES, "\n".join(lines) + "\n")
    write_text(where / CONFIG, json.dumps({**(config or {}), "sink_size": sink, "recent_size": recent}))
    return where
