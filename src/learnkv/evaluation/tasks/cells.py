"""Cells of a table of prompts: answers as a list, however the program that wrote the table writes lists."""

import ast
import json
import re
from collections.abc import Iterator, Mapping
from math import isnan
from typing import Any

from learnkv.data.documents import check_text
from learnkv.data.sample import check_answers
from learnkv.errors import UserError

EXPECTED = 'expected text, a whole number or a list of these, in a csv file as ["12", "34"]'
_TOKEN = re.compile(
    r"""\s*(?:
    (?P<text>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
  | (?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)
  | (?P<name>[A-Za-z_][\w.]*)
  | (?P<mark>[\[\]{}(),:=])
    )\s*""",
    re.VERBOSE | re.DOTALL,
)
_LIST = re.compile(r"\s*(?:\[|\{|array\(|\(\s*['\"])")
"""How a list or mapping begins that is written as text; a tuple only with a quoted text, as others begin so too."""
_CONSTANTS = {"None": None, "null": None, "nan": None, "True": True, "False": False, "true": True, "false": False}


def answers_of(cell: Any, where: str) -> list[str]:
    """The expected strings of an answer cell.

    Args:
        cell: text, a whole number, a list of these, or `{"text": [...]}` as in SQuAD; lists may be written as text by
            Python, numpy or JSON.
        where: file, row and column, for errors.

    Raises:
        UserError: nothing to score by, or what could be read in two ways.
    """
    if isinstance(cell, str) and _LIST.match(cell):
        cell = _parsed(cell, where)
    if isinstance(cell, Mapping):
        if "text" not in cell:
            raise UserError(f"{where}: {EXPECTED}, got a mapping of {', '.join(map(str, cell)) or 'nothing'}")
        cell = cell["text"]
    answers = [_answer(value, where) for value in (cell if isinstance(cell, list) else [cell])]
    check_answers(answers, where)
    return answers


def text_of(cell: Any, where: str, blank: bool = True) -> str:
    """The text of a cell; a blank one is "" where that is allowed.

    Raises:
        UserError: any other type, or a blank cell that must not be one.
    """
    if is_blank(cell):
        cell = ""
    if not isinstance(cell, str):
        raise UserError(f"{where}: expected text, got {_shown(cell)}")
    if not blank and not cell.strip():
        raise UserError(f"{where}: expected text, got a blank cell")
    return check_text(cell, where)


def count_of(cell: Any, where: str) -> int:
    """A whole number of at least 1. Raises UserError for anything else."""
    try:
        count = float("nan") if isinstance(cell, bool) or is_blank(cell) else float(cell)
    except (TypeError, ValueError, OverflowError):
        count = float("nan")
    if not (count >= 1 and count.is_integer()):
        raise UserError(f"{where}: expected a whole number of at least 1, got {_shown(cell)}")
    return int(count)


def is_blank(cell: Any) -> bool:
    """Whether a cell has no value."""
    return cell is None or cell == "" or (isinstance(cell, float) and isnan(cell))


def _answer(value: Any, where: str) -> str:
    if isinstance(value, list) and len(value) == 1:  # a list of alternatives of which there is one
        value = value[0]
    if is_blank(value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{where}: {EXPECTED}, got {_shown(value)}")
    return str(value)


def _shown(value: Any) -> str:
    text = "nothing" if is_blank(value) else str(value)
    kind = "" if is_blank(value) or isinstance(value, str) else f" ({type(value).__name__})"
    return text[:60] + ("…" if len(text) > 60 else "") + kind


def _parsed(text: str, where: str) -> Any:
    """A list or mapping that JSON, Python or numpy wrote; numpy separates by spaces."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        tokens = _tokens(text)
        value = _value(tokens, next(tokens))
        if next(tokens, None) is not None:
            raise ValueError
    except (ValueError, StopIteration, RecursionError):
        raise UserError(f"{where}: {EXPECTED}, got {_shown(text)}") from None
    return value


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    """Kind and text of each token."""
    end = 0
    while end < len(text):
        match = _TOKEN.match(text, end)
        if match is None or match.lastgroup is None:
            raise ValueError(text)
        end = match.end()
        yield match.lastgroup, match[match.lastgroup]


def _value(tokens: Iterator[tuple[str, str]], token: tuple[str, str]) -> Any:
    kind, text = token
    if kind == "text":
        return _unquoted(text)
    if kind == "number":
        return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)
    if kind == "name":
        return _CONSTANTS[text] if text in _CONSTANTS else _call(tokens, text)
    if text in "[(":
        return [_value(tokens, item) for item in _items(tokens, "]" if text == "[" else ")")]
    if text == "{":
        return {_value(tokens, key): _after(tokens, ":") for key in _items(tokens, "}")}
    raise ValueError(text)


def _unquoted(text: str) -> str:
    """A string literal without its quotes and escapes."""
    value = ast.literal_eval(text.replace("\n", "\\n"))
    assert isinstance(value, str)
    return value


def _items(tokens: Iterator[tuple[str, str]], end: str) -> Iterator[tuple[str, str]]:
    """First tokens of the items up to `end`, with commas or without."""
    for token in tokens:
        if token == ("mark", end):
            return
        if token != ("mark", ","):
            yield token
    raise ValueError(end)


def _after(tokens: Iterator[tuple[str, str]], mark: str) -> Any:
    if next(tokens) != ("mark", mark):
        raise ValueError(mark)
    return _value(tokens, next(tokens))


def _call(tokens: Iterator[tuple[str, str]], name: str) -> Any:
    """The argument of numpy's `array([...], dtype=object)` and `np.str_('...')`."""
    if not re.fullmatch(r"array|list|tuple|np\.\w+", name) or next(tokens) != ("mark", "("):
        raise ValueError(name)
    value = _value(tokens, next(tokens))
    for token in tokens:
        if token == ("mark", ")"):
            return value
    raise ValueError(name)
