"""Prompt templates in three parts, from this package or from a file in a benchmark's own layout."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from learnkv.errors import UserError
from learnkv.formats.files import read_json, read_yaml

_SLOT = re.compile(r"\{(\w+)\}")
_OLDER_SLOTS = {"$DOC$": "{context}", "$Q$": "{question}", **{f"$C_{c}$": f"{{choice_{c}}}" for c in "ABCD"}}
"""Slots of LongBench v2's files."""


class Template(NamedTuple):
    """Text of a prompt's parts with slots such as `{context}`."""

    context: str
    question: str
    answer_prefix: str = ""

    def fill(self, **slots: str) -> "Template":
        """The parts with every slot replaced; other braces stay as they are."""
        return Template(*(_SLOT.sub(lambda slot: slots[slot[1]], part) for part in self))

    def slots(self) -> set[str]:
        """Names of the slots."""
        return {name for part in self for name in _SLOT.findall(part)}


def template_of(file: str | None, names: tuple[str, ...], default: Template, slots: set[str]) -> Template:
    """The template of a task: the first of `names` that the file has, else `default`.

    Args:
        slots: names that a template may have; those of `default` it must have.

    Raises:
        UserError: a file that cannot be read, or a template with other slots.
    """
    given = {} if file is None else _templates(file)
    name = next((name for name in names if name in given), None)
    if name is None:
        return default
    template, needed = _parsed(given[name], f"suite.templates={file}: {name}"), default.slots()
    if not needed <= template.slots() <= slots:
        has = ", ".join(sorted(template.slots())) or "none"
        raise UserError(f"suite.templates={file}: {name}: expected the slots {', '.join(sorted(needed))}, got {has}")
    return template


@cache
def _templates(file: str) -> Mapping[str, Any]:
    content = read_json(file) if file.endswith(".json") else read_yaml(file)
    if not isinstance(content, dict) or not content:
        raise UserError(f"suite.templates={file}: expected templates by task, got {str(content)[:60]}")
    return content


def _parsed(value: Any, where: str) -> Template:
    """A template from a mapping of parts, or from one text.

    The context part of a text ends with `{context}`, or with the last slot where there is no such one. The answer
    prefix is its last line, where that has no slot and ends with a colon.
    """
    if isinstance(value, str):
        for older, slot in _OLDER_SLOTS.items():
            value = value.replace(older, slot)
        slots = list(_SLOT.finditer(value))
        ends = [slot.end() for slot in slots if slot[1] == "context"] or [slot.end() for slot in slots] or [0]
        context, rest = value[: ends[-1]], value[ends[-1] :]
        cue = re.search(r"[^\n]+[:\uff1a]\s*\Z", rest)
        begin = len(rest) if cue is None or _SLOT.search(cue[0]) else cue.start()
        return Template(context, rest[:begin], rest[begin:])
    if not isinstance(value, dict) or not {"context"} <= value.keys() <= {*Template._fields}:
        raise UserError(f"{where}: expected text, or {', '.join(Template._fields)}, got {str(value)[:60]}")
    if not all(isinstance(part, str) for part in value.values()):
        raise UserError(f"{where}: expected text in {', '.join(Template._fields)}")
    return Template(value["context"], value.get("question", ""), value.get("answer_prefix", ""))
