"""Fixed-length token windows of text data sets: a hub id or local text, JSON lines and Parquet files."""

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from glob import glob
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch

from learnkv.data.documents import READERS, Piece, file_pieces, row_pieces, suffix
from learnkv.errors import UserError
from learnkv.formats.files import file_digest
from learnkv.formats.hub_network import check_hub

DOCUMENTS = 1000
"""Documents that are joined; the tokens after their last whole window are dropped."""
_BUFFERED_TOKENS = 1 << 22


@dataclass(frozen=True)
class StreamedWindows:
    """Windows that are tokenised whenever they are iterated.

    Args:
        windows: makes an iterator of all windows.
        first: number of skipped windows.
        count: windows after these; None: all.
    """

    windows: Callable[[], Iterator[dict[str, Any]]]
    first: int = 0
    count: int | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        end = None if self.count is None else self.first + self.count
        for window in islice(self.windows(), self.first, end):
            yield {"input_ids": torch.from_numpy(window["input_ids"]).long()}

    def skip(self, count: int) -> "StreamedWindows":
        """Without the first `count` windows."""
        return replace(self, first=self.first + count, count=None if self.count is None else self.count - count)

    def take(self, count: int) -> "StreamedWindows":
        """The first `count` windows."""
        return replace(self, count=count if self.count is None else min(count, self.count))


@dataclass(frozen=True)
class Source:
    """Documents of a text."""

    name: str
    pieces: Callable[[], Iterator[Piece]]
    digest: Callable[[], str]
    """Hash of the content; None where it is streamed from the hub."""


def text_windows(
    source: str | Iterable[str],
    tokenizer: Any,
    window: int,
    *,
    name: str | None = None,
    split: str = "train",
    column: str = "text",
    streaming: bool = False,
) -> Any:
    """Windows of `window` token ids, column "input_ids", in the order of the text.

    Documents are tokenised once, in pieces (the result is cached on disk by content, unless streamed), joined by the
    end-of-text token and cut; the remainder after every 1,000 documents is dropped. A window begins with the
    beginning-of-text token if the tokenizer begins prompts with one.

    Args:
        source: hub id, or file, files or glob pattern: .txt (a document each), .jsonl, .parquet, also .gz.
        tokenizer: any Hugging Face tokenizer.
        window: tokens of a window.
        name: configuration of a data set on the hub.
        split: split of a data set on the hub; local files are one split.
        column: column with the text; .txt files have "text".
        streaming: tokenise while iterating, for data sets too large to be cached.

    Returns a `datasets.Dataset` or, streamed, `StreamedWindows`. Raises UserError for a missing or broken file, an
    unknown format, a missing column and a text without one whole window.
    """
    head = _prompt_head(tokenizer)
    if window <= len(head):
        raise UserError(f"window={window}: expected more than {len(head)} tokens")
    text = _source(source, name, split, column, streaming)
    windows = partial(_windows, text.pieces, tokenizer, window, head)
    if streaming:
        if next(windows(), None) is None:
            raise _too_short(text.name, window)
        return StreamedWindows(windows)
    key = (text.digest(), _identity(tokenizer), window, column)
    rows = _cached(windows, hashlib.sha256(repr(key).encode()).hexdigest()[:32], window, text.name)
    return rows.with_format("torch")


def text_contents(source: Iterable[str]) -> list[str]:
    """What a text is, without its path: the hash of every file's content, or the hub id."""
    patterns = list(source)
    if not all(map(_is_local, patterns)):
        return patterns
    return [file_digest(file) for file in local_files(patterns)]


def local_files(patterns: Iterable[str]) -> list[str]:
    """Files of paths and glob patterns, in order. Raises UserError where there is none."""
    matches = {pattern: _matching(pattern) for pattern in patterns}
    if missing := [pattern for pattern, paths in matches.items() if not paths]:
        raise UserError(f"text {', '.join(missing)}: no such file")
    return [file for paths in matches.values() for file in paths]


def _matching(pattern: str) -> list[str]:
    path = os.path.expanduser(pattern)
    return [path] if os.path.exists(path) else sorted(glob(path))


def _source(source: str | Iterable[str], name: str | None, split: str, column: str, streaming: bool) -> Source:
    patterns = [source] if isinstance(source, str) else list(source)
    if not all(_is_local(pattern) for pattern in patterns):
        if len(patterns) != 1:
            raise UserError(f"text {patterns}: expected local files, or one hub id alone")
        return _hub_source(patterns[0], name, split, column, streaming)
    files = local_files(patterns)
    if len(formats := {suffix(file) for file in files}) > 1 and formats != {".json", ".jsonl"}:
        raise UserError(f"text {', '.join(patterns)}: expected files of one format, found {', '.join(sorted(formats))}")
    return Source(", ".join(patterns), partial(file_pieces, files, column), lambda: repr([*map(file_digest, files)]))


def _hub_source(repository: str, name: str | None, split: str, column: str, streaming: bool) -> Source:
    """A data set on the hub. Raises UserError where it cannot be loaded."""
    check_hub(f"text {repository}")
    try:
        rows = datasets.load_dataset(repository, name, split=split, streaming=streaming)
        columns = rows.column_names or list(next(iter(rows), {}))  # a stream may not know them before its first row
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"text {repository}: no such file, and loading it from the hub failed: {first}") from None
    if column not in columns:
        raise UserError(f"column={column!r}: {repository} has {', '.join(columns)}")
    return Source(repository, partial(row_pieces, rows, repository, column), lambda: str(rows._fingerprint))


def _is_local(pattern: str) -> bool:
    """Whether these are local files, not a data set on the hub. Raises UserError for a file of an unknown format."""
    if suffix(pattern) in READERS:
        return True
    if Path(pattern).expanduser().exists():
        raise UserError(f"text {pattern}: expected one of {', '.join(READERS)} or these with .gz")
    return False


def _prompt_head(tokenizer: Any) -> list[int]:
    """The beginning-of-text token if prompts begin with it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()


def _cached(windows: Callable[[], Iterator[dict[str, Any]]], key: str, window: int, name: str) -> Any:
    """The windows on disk, written once per key. Raises UserError where there is none."""
    shows = datasets.are_progress_bars_disabled() or sys.stderr.isatty()
    if not shows:
        datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(
            partial(_at_least_one, windows, name, window),
            features=datasets.Features({"input_ids": datasets.Sequence(datasets.Value("int32"))}),
            cache_dir=str(_cache_folder(datasets.config.HF_DATASETS_CACHE)),
            fingerprint=key,
            writer_batch_size=max(1, min(1000, _BUFFERED_TOKENS // window)),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    finally:
        if not shows:
            datasets.enable_progress_bars()


def _at_least_one(windows: Callable[[], Iterator[dict[str, Any]]], name: str, window: int) -> Iterator[dict[str, Any]]:
    empty = True
    for row in windows():
        empty = False
        yield row
    if empty:
        raise _too_short(name, window)


def _too_short(name: str, window: int) -> UserError:
    return UserError(f"text {name}: no window of {window} tokens in it")


@lru_cache(maxsize=4)
def _cache_folder(folder: Path) -> Path:
    """The folder of `datasets`' cache, or a temporary one where that cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return Path(folder)
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="learnkv-text-"))


def _windows(
    pieces: Callable[[], Iterator[Piece]], tokenizer: Any, window: int, head: list[int]
) -> Iterator[dict[str, Any]]:
    """Windows as int32 arrays, each as soon as its tokens are read."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body, ids = window - len(head), list[int]()
    documents, empty = 0, True
    for text, ends in pieces():
        if text:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"]
            empty = False
        if ends and not empty:
            ids += end
        cut = len(ids) - len(ids) % body
        for first in range(0, cut, body):
            yield {"input_ids": np.array(head + ids[first : first + body], dtype=np.int32)}
        del ids[:cut]
        if ends:
            documents, empty = documents + 1, True
            if documents % DOCUMENTS == 0:
                ids.clear()
