"""Haystacks: sentences of noise, of essays, and of the documentation in every CPython."""

import ast
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

from learnkv.data.documents import read_document
from learnkv.errors import UserError

NOISE = "The lamp is lit. The kettle is warm. The street is quiet. Rain falls and stops. Nothing else happens here."

PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging"),
    *("multiprocessing", "unittest", "urllib", "wsgiref", "xml", "xmlrpc"),
)


def collapse_whitespace(text: str) -> str:
    """`text` with every run of whitespace replaced by one space."""
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """`text` with collapsed whitespace, split after '.', '!' or '?' at the space that follows."""
    return [part for part in re.split(r"(?<=[.!?]) ", collapse_whitespace(text)) if part]


@lru_cache(maxsize=4)
def essay(path: str | None = None) -> tuple[str, ...]:
    """Sentences of the evaluation's haystack: a .txt or .txt.gz file, or CPython's own help topics.

    The help topics (`pydoc_data.topics`, natural English of about 460 KB) are for evaluation only, never for training.
    Raises UserError, with file and line, for one that cannot be read, is not UTF-8 or has no text.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = " ".join(topics[name] for name in sorted(topics))
    else:
        text = read_document(str(path), "haystack")
    split = tuple(sentences(text))
    if not split:
        raise UserError(f"haystack={path}: expected a text file with at least one sentence, it is empty")
    return split


@lru_cache(maxsize=1)
def docstrings() -> tuple[str, ...]:
    """Training text of every machine: docstrings of the standard library's modules, spaces collapsed, in path order.

    About 650 KB of English. Packages are excluded, and with them the help topics that are evaluation's haystack.
    """
    return _docstrings("*.py")


@lru_cache(maxsize=1)
def held_out_docstrings() -> tuple[str, ...]:
    """Held-out text of every machine: docstrings of `PACKAGES` of the standard library."""
    training = set(docstrings())
    return tuple(text for name in PACKAGES for text in _docstrings(f"{name}/**/*.py") if text not in training)


def _docstrings(pattern: str) -> tuple[str, ...]:
    texts: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern)):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = collapse_whitespace(ast.get_docstring(node, clean=False) or "")
                if len(text) >= 200 and text.isascii():
                    texts[text] = None
    return tuple(texts)
