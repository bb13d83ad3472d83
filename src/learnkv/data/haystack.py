"""Text that hides needles: sentences of noise, of essays, and of the documentation that every CPython carries."""

import ast
import gzip
import re
import sysconfig
from functools import lru_cache
from pathlib import Path

from learnkv.errors import UserError

NOISE = "The lamp is lit. The kettle is warm. The street is quiet. Rain falls and stops. Nothing else happens here."

PACKAGES = (
    *("asyncio", "collections", "concurrent", "ctypes", "email", "html", "http", "importlib", "json", "logging"),
    *("multiprocessing", "unittest", "urllib", "wsgiref", "xml", "xmlrpc"),
)


def fold(text: str) -> str:
    """`text` with every run of whitespace replaced by one space."""
    return " ".join(text.split())


def sentences(text: str) -> list[str]:
    """Whitespace-folded `text` cut after '.', '!' or '?' followed by a space; nothing is lost but that space."""
    return [part for part in re.split(r"(?<=[.!?]) ", fold(text)) if part]


@lru_cache(maxsize=4)
def essay(path: str | None = None) -> tuple[str, ...]:
    """Sentences of the evaluation's haystack: a .txt or .txt.gz file, or CPython's own help topics.

    The help topics (`pydoc_data.topics`, natural English of about 460 KB) are for evaluation only and are never
    trained on. Raises ValueError for a file without text and OSError for one that cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics

        text = " ".join(topics[name] for name in sorted(topics))
    else:
        with (
            gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8") as f
        ):
            text = f.read()
    found = tuple(sentences(text))
    if not found:
        raise UserError(f"haystack={path}: expected a text file with at least one sentence, it is empty")
    return found


@lru_cache(maxsize=1)
def docstrings() -> tuple[str, ...]:
    """Training text on every machine: docstrings of the standard library's modules, whitespace folded, in path order.

    Some 650 KB of English; packages are left out, and with them the help topics that evaluation hides its needles in.
    """
    return _docstrings("*.py")


@lru_cache(maxsize=1)
def held_out_docstrings() -> tuple[str, ...]:
    """Text on every machine that nothing is trained on: docstrings of `PACKAGES` of the standard library."""
    known = set(docstrings())
    return tuple(text for name in PACKAGES for text in _docstrings(f"{name}/**/*.py") if text not in known)


def _docstrings(pattern: str) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob(pattern)):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = fold(ast.get_docstring(node, clean=False) or "")
                if len(text) >= 200 and text.isascii():
                    found[text] = None
    return tuple(found)
