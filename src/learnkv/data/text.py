"""Fixed-length token windows of text data sets: a hub id or local text, JSON lines and Parquet files."""

import hashlib
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any

import datasets

from learnkv.errors import UserError

FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


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

    Documents are tokenised once (`datasets` caches the result on disk, unless streamed), joined by the end-of-text
    token and cut; the remainder after every 1,000 documents is dropped. A window begins with the
    beginning-of-text token if the tokenizer begins prompts with one.

    Args:
        source: hub id, or file, files or glob pattern: .txt (a document each), .jsonl, .parquet, also .gz.
        tokenizer: any Hugging Face tokenizer.
        window: tokens of a window.
        name: configuration of a data set on the hub.
        split: split of a data set on the hub; local files are one split.
        column: column with the text; .txt files have "text".
        streaming: tokenise while iterating, for data sets too large to be cached.

    Returns a `datasets.Dataset` or, streamed, a `datasets.IterableDataset`. Raises UserError for a missing file, an
    unknown format, a missing column and a text without one whole window.
    """
    rows = _load(source, name, split, streaming)
    columns = rows.column_names or list(next(iter(rows)))  # a stream may not know its columns before its first row
    if column not in columns:
        raise UserError(f"column={column!r}: {source} has {', '.join(columns)}")
    head = _prompt_head(tokenizer)
    if window <= len(head):
        raise UserError(f"window={window}: expected more than {len(head)} tokens")
    options: dict[str, Any] = {}
    if not streaming:
        # The library's own hash of a tokenizer changes with its padding state, which would tokenise again.
        key = (rows._fingerprint, _identity(tokenizer), window, column)
        options["new_fingerprint"] = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    windows = rows.map(
        _cut,
        batched=True,
        batch_size=1000,
        remove_columns=columns,
        fn_kwargs={"tokenizer": tokenizer, "window": window, "column": column, "head": head},
        **options,
    )
    if not streaming and len(windows) == 0:
        raise UserError(f"text {source}: no window of {window} tokens in it")
    return windows.with_format("torch")


def _load(source: str | Iterable[str], name: str | None, split: str, streaming: bool) -> Any:
    patterns = [source] if isinstance(source, str) else list(source)
    if not all(_is_local(pattern) for pattern in patterns):
        if len(patterns) != 1:
            raise UserError(f"text {patterns}: expected local files, or one hub id alone")
        return datasets.load_dataset(patterns[0], name, split=split, streaming=streaming)
    matches = {pattern: sorted(glob(pattern)) for pattern in patterns}
    if missing := [pattern for pattern, paths in matches.items() if not paths]:
        raise UserError(f"text {', '.join(missing)}: no such file")
    files = [file for paths in matches.values() for file in paths]
    formats = {FORMATS[_suffix(file)] for file in files}
    if len(formats) > 1:
        raise UserError(f"text {', '.join(patterns)}: expected files of one format, found {', '.join(sorted(formats))}")
    kind = formats.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)


def _is_local(pattern: str) -> bool:
    """Whether these are local files, not a data set on the hub. Raises UserError for a file of an unknown format."""
    if _suffix(pattern) in FORMATS:
        return True
    if Path(pattern).exists():
        raise UserError(f"text {pattern}: expected one of {', '.join(FORMATS)} or these with .gz")
    return False


def _suffix(path: str) -> str:
    return Path(path.removesuffix(".gz")).suffix


def _prompt_head(tokenizer: Any) -> list[int]:
    """The beginning-of-text token if prompts begin with it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _identity(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(content.encode()).hexdigest()


def _cut(rows: dict[str, list[str]], *, tokenizer: Any, window: int, column: str, head: list[int]) -> dict[str, Any]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    for text in rows[column]:
        if text:
            ids += tokenizer(text, add_special_tokens=False)["input_ids"] + end
    body = window - len(head)
    return {"input_ids": [head + ids[i : i + body] for i in range(0, len(ids) - body + 1, body)]}
