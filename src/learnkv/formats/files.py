"""Reading and writing files: bounded YAML, JSON and safetensors, shipped tables, atomic writes, one-line errors."""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from learnkv.errors import UserError

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a run that cannot go on, not of a wrong argument."""
_REFERENCE = Path(__file__).resolve().parents[1] / "reference"
TABLES = _REFERENCE / "tables"
MODELS_WITH_TABLES = {"reference": TABLES, **{path.parent.name: path for path in _REFERENCE.glob("*/tables")}}
"""Folders of the tables in this package, by the name that `model=` takes."""
TEXT_BYTES, YAML_BYTES = 1 << 28, 1 << 20
"""Largest text or JSON file and largest YAML file that is read."""
MAX_DEPTH, MAX_VALUES = 64, 1_000_000
"""Deepest nesting of a YAML or JSON file, and most values of a YAML file or checkpoint with its aliases expanded."""


def locate(path: str, shipped: str) -> Path:
    """The file of a policy's argument: a path, or the name of a model with tables here, for its file `shipped`."""
    file = Path(path).expanduser()
    return MODELS_WITH_TABLES[path] / shipped if path in MODELS_WITH_TABLES and not file.exists() else file


def read_text(path: str | Path, limit: int = TEXT_BYTES) -> str:
    """Text of a file of at most `limit` bytes. Raises UserError where it is missing, larger or not text."""
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(limit + 1)
        if len(content) > limit:
            raise UserError(f"{path}: expected at most {limit:,} bytes")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text (UTF-8)"
        raise UserError(f"{path}: cannot be read: {reason}") from None


def read_json(path: str | Path) -> Any:
    """Content of a JSON file. Raises UserError where it is not JSON, or nested deeper than `MAX_DEPTH`."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected JSON: {error}") from None
    _expanded(content, path)
    return content


def parse_json(text: str) -> Any:
    """JSON as plain containers. Raises ValueError, also for a key that an object has twice; RecursionError."""
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"an object has the key {_repeated(key for key, _ in pairs)!r} twice")
    return content


def _repeated(keys: Iterable[Any]) -> Any:
    """The first key that occurs twice; None where there is none."""
    return next((key for key, count in Counter(keys).items() if count > 1), None)


def read_yaml(path: str | Path) -> Any:
    """Content of a YAML file as plain containers; tags of Python objects are refused.

    Raises:
        UserError: missing or broken file, more than `YAML_BYTES`, nesting deeper than `MAX_DEPTH`, an alias within its
            own anchor, more than `MAX_VALUES` values once aliases are expanded.
    """
    loader = None
    try:
        loader = _ShallowLoader(read_text(path, YAML_BYTES))
        node = loader.get_single_node()
        if node is None:
            return None
        check_size(node, path)
        return loader.construct_document(node)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}: expected YAML: {error.problem or error.context}{line}") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: expected YAML: {str(error).splitlines()[0]}") from None
    finally:
        if loader is not None:
            loader.dispose()


class _ShallowLoader(yaml.SafeLoader):
    """A safe loader that stops at the first value below `MAX_DEPTH` and at a key that a mapping has twice."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise yaml.YAMLError(f"is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        keys = (key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if (key := _repeated(keys)) is not None:
            raise yaml.YAMLError(f"a mapping has the key {key!r} twice")
        return node


def check_size(content: Any, path: str | Path) -> None:
    """Raise UserError for plain containers or YAML nodes that are nested too deeply, in themselves, or too large.

    Whatever occurs twice is counted twice.
    """
    if _expanded(content, path) > MAX_VALUES:
        raise UserError(f"{path}: expected at most {MAX_VALUES:,} values, its aliases stand for more")


def _expanded(content: Any, path: str | Path) -> int:
    """Values in nested containers, shared ones counted wherever they occur."""
    counted: dict[int, tuple[int, int]] = {}  # values and nesting of every container

    def count(container: Any, depth: int) -> tuple[int, int]:
        if depth > MAX_DEPTH:
            raise UserError(f"{path}: is nested deeper than {MAX_DEPTH} levels")
        if id(container) not in counted:
            values = _values(container)
            inner = [count(value, depth + 1) for value in values if isinstance(value, _CONTAINERS)]
            nesting = 1 + max((below for _, below in inner), default=0)
            counted[id(container)] = len(values) + sum(size for size, _ in inner), nesting
        if depth + counted[id(container)][1] > MAX_DEPTH + 1:
            raise UserError(f"{path}: is nested deeper than {MAX_DEPTH} levels")
        return counted[id(container)]

    return count(content, 0)[0]


_CONTAINERS = (Mapping, list, tuple, yaml.CollectionNode)


def _values(container: Any) -> Sequence[Any]:
    """Values in a plain container, keys and values of a YAML node."""
    if isinstance(container, Mapping):
        return list(container.values())
    if isinstance(container, yaml.MappingNode):
        return [part for pair in container.value for part in pair]
    if isinstance(container, yaml.SequenceNode):
        return list(container.value)
    return container if isinstance(container, list | tuple) else ()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name. Raises UserError where it cannot be read."""
    try:
        tensors: dict[str, Tensor] = load_file(Path(path).expanduser())
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read: {reason}") from None
    return tensors


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content, computed once per process while size, time and inode stay the same."""
    file = Path(path).expanduser()
    status = file.stat()
    return _file_digest(str(file.resolve()), (status.st_size, status.st_mtime_ns, status.st_ino))


@lru_cache(maxsize=4096)
def _file_digest(path: str, identity: tuple[int, ...]) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_digest(folder: Path, endings: tuple[str, ...] = ()) -> str:
    """SHA-256 of the names and contents of a folder's files, optionally only those with one of these endings."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    wanted = [path for path in files if not endings or path.suffix in endings]
    return hashlib.sha256(repr([(path.name, file_digest(path)) for path in wanted]).encode()).hexdigest()


def content_digest(text: str) -> str | None:
    """Digest of the file or folder that a text names; None for other texts, such as the name of an option."""
    if "/" not in text and "." not in text:
        return None
    path = Path(text).expanduser()
    try:
        return file_digest(path) if path.is_file() else folder_digest(path) if path.is_dir() else None
    except (OSError, ValueError, RuntimeError):
        return None


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
        OSError: the disk is full.
    """
    file = Path(path).expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as part:
            yield part
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: str | Path, text: str) -> Path:
    """Write a text file; returns its path. Raises UserError as `output_file` does."""
    with output_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path).expanduser()


def make_folder(path: Path, key: str) -> Path:
    """Create a folder where it is missing. Raises UserError, naming the argument `key`, where it cannot be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, "no permission to write, or a read-only file system", str(path))
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
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
