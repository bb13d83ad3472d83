"""Documents of text, JSON lines and Parquet files, read in pieces so that no large document is tokenised whole."""

import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from learnkv.errors import UserError
from learnkv.formats.files import parse_json

PIECE = 1 << 18
"""Most characters that are tokenised at once."""
_SEAMS = (r"\n(?=\S)", r"(?=\s)")  # after the last line break, else before the last space
_SEARCHED = 1 << 13

Piece = tuple[str, bool]
"""Text, and whether its document ends with it."""


def file_pieces(files: Iterable[str], column: str) -> Iterator[Piece]:
    """Documents of files in order; a document is a text file, a row's column, or empty where a row has none.

    Raises:
        UserError: a file that cannot be read, is not UTF-8, or has a broken row; it names file and line.
    """
    for file in files:
        with _readable(f"text {file}"):
            yield from READERS[suffix(file)](file, column)


def read_document(file: str, key: str) -> str:
    """A text file, which may be compressed (.gz), as a whole. Raises UserError as `file_pieces` does."""
    with _readable(f"{key}={file}"):
        return "".join(text for text, _ in _plain(file, "text", f"{key}={file}"))


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Turn errors of reading into a UserError that begins with `what`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{what}: cannot be read: {reason}") from None


def row_pieces(rows: Iterable[Any], source: str, column: str) -> Iterator[Piece]:
    """Documents of a data set's rows."""
    for number, row in enumerate(rows):
        yield from split(_text_of(row, column, f"text {source}, row {number}"))


def suffix(path: str) -> str:
    """The ending that names a file's format, without .gz."""
    return Path(path.removesuffix(".gz")).suffix


def split(text: str) -> Iterator[Piece]:
    """A document in pieces of at most `PIECE` characters, cut between lines or words where there is such a place."""
    while len(text) > PIECE:
        end = _seam(text[:PIECE])
        yield text[:end], False
        text = text[end:]
    yield text, True


def _seam(text: str) -> int:
    """The last position at which a text can be cut without splitting a word."""
    first = max(1, len(text) - _SEARCHED)
    for pattern in _SEAMS:
        if ends := [match.end() for match in re.compile(pattern).finditer(text, first)]:
            return ends[-1]
    return len(text)


def _open(file: str) -> IO[bytes]:
    return gzip.open(file, "rb") if file.endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def _plain(file: str, column: str, what: str | None = None) -> Iterator[Piece]:
    """A text file as one document."""
    if column != "text":
        raise UserError(f"column={column!r}: {file} has text")
    rest = ""
    try:
        with _open(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as stream:
            while chunk := stream.read(PIECE):
                *pieces, (rest, _) = split(rest + chunk)
                yield from pieces
    except UnicodeDecodeError:
        raise UserError(f"{what or f'text {file}'}, line {_undecodable_line(file)}: is not UTF-8") from None
    yield rest, True


def _undecodable_line(file: str) -> int:
    with _open(file) as raw:
        return next(number for number, line in enumerate(raw, 1) if _decoded(line) is None)


def _decoded(line: bytes) -> str | None:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _json(file: str, column: str) -> Iterator[Piece]:
    """JSON lines, or one list of objects."""
    with _open(file) as raw:
        if re.match(rb"(\xef\xbb\xbf)?\s*\[", raw.read(64)):
            raw.seek(0)
            rows = _parsed(raw.read(), f"text {file}")
            yield from (piece for i, row in enumerate(rows, 1) for piece in _row(row, column, file, f"entry {i}"))
            return
        raw.seek(0)
        for number, line in enumerate(raw, 1):
            if line.strip():
                row = _parsed(line, f"text {file}, line {number}")
                yield from _row(row, column, file, f"line {number}")


def _parsed(line: bytes, where: str) -> Any:
    text = _decoded(line)
    if text is None:
        raise UserError(f"{where}: is not UTF-8")
    try:
        return parse_json(text.removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected JSON: {str(error).partition(': line')[0]}") from None


def _row(row: Any, column: str, file: str, where: str) -> Iterator[Piece]:
    if not isinstance(row, dict):
        raise UserError(f"text {file}, {where}: expected an object with {column}, got {type(row).__name__}")
    if column not in row:
        raise UserError(f"column={column!r}: {where} of {file} has {', '.join(map(str, row)) or 'nothing'}")
    yield from split(_text_of(row, column, f"text {file}, {where}"))


def _text_of(row: Any, column: str, where: str) -> str:
    """A row's text, empty for null."""
    text = row[column]
    if text is None:
        return ""
    return check_text(text, where, f"text in {column}")


def check_text(text: Any, where: str, expected: str = "text") -> str:
    """The text itself. Raises UserError for any other type, and for half of a surrogate pair."""
    if not isinstance(text, str):
        raise UserError(f"{where}: expected {expected}, got {type(text).__name__}")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise UserError(f"{where}: expected {expected}, it has half of a surrogate pair")
    return text


def _parquet(file: str, column: str) -> Iterator[Piece]:
    """Rows of a Parquet file."""
    with _open(file) as raw:
        table = pq.ParquetFile(io.BytesIO(raw.read()) if file.endswith(".gz") else raw)
        if column not in table.schema_arrow.names:
            raise UserError(f"column={column!r}: {file} has {', '.join(table.schema_arrow.names)}")
        row = 0
        for batch in table.iter_batches(batch_size=64, columns=[column]):
            for text in batch.column(0):
                yield from split(_text_of({column: text.as_py()}, column, f"text {file}, row {row}"))
                row += 1


READERS: dict[str, Callable[[str, str], Iterator[Piece]]] = {
    ".txt": _plain,
    ".jsonl": _json,
    ".json": _json,
    ".parquet": _parquet,
}
