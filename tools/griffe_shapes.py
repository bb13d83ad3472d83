"""Docstrings on the site: shapes such as [L][H] are no Markdown links."""

import re
from typing import Any

import griffe


class Shapes(griffe.Extension):
    """Escapes what Markdown would take for a reference link, outside of code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring is not None:
            pieces = re.split(r"(`[^`]*`)", obj.docstring.value)
            obj.docstring.value = "".join(p if p.startswith("`") else p.replace("][", "]\\[") for p in pieces)
