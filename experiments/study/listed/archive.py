"""Samples of a study in its results, so that another machine goes on with them and readers compare by prompt.

The prompts' texts, the answers, and seconds stay behind, answers unless a page shows the prompt; budgets are rounded.
"""

import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.study.config import NAME
from learnkv.errors import UserError
from learnkv.evaluation.kept_entries import VIEW
from learnkv.evaluation.results import Record
from learnkv.formats.files import atomic_write

FILE = "samples.jsonl.gz"
LEFT_OUT = frozenset({"prompt", "expected", "answer", "prefill_seconds", "decode_seconds", "peak_bytes"})
SHOWN = frozenset({"expected", "answer"})
DIGITS = 4
"""Decimals of budgets and bytes."""


def file_of(name: str) -> str:
    """The file of a study's samples, by the study's name."""
    return FILE if name == NAME else f"{name}-{FILE}"


def write_archive(path: Path, records: Mapping[str, Sequence[Record]]) -> Path:
    """One line per sample with the name of its comparison, in the order of the comparisons."""
    lines = [json.dumps({"comparison": name, **_short(one)}) for name, those in records.items() for one in those]
    with atomic_write(path) as part:
        part.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    return path


def read_archive(path: Path) -> dict[str, list[Record]]:
    """Samples by comparison; none where there is no file. UserError for a file of another format."""
    found = dict[str, list[Record]]()
    if not path.is_file():
        return found
    try:
        for line in gzip.decompress(path.read_bytes()).decode().splitlines():
            record = json.loads(line)
            found.setdefault(record.pop("comparison"), []).append(record)
    except (OSError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: expected samples of a study ({error})") from None
    return found


def _short(record: Record) -> dict[str, Any]:
    shown = SHOWN if VIEW in record else frozenset[str]()
    short = {key: value for key, value in record.items() if key not in LEFT_OUT - shown}
    if "budgets" in short:
        short["budgets"] = [[round(share, DIGITS) for share in layer] for layer in short["budgets"]]
    return {key: round(value, DIGITS) if key in ("bytes", "bytes_full") else value for key, value in short.items()}
