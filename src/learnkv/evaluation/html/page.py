"""Writing the page: its data as JSON, the programs that show it and plotly, in one file."""

import base64
import functools
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, StrictUndefined, Template
from plotly.offline import get_plotlyjs

from learnkv.evaluation.html.charts import FOREGROUND, pareto_charts
from learnkv.evaluation.html.heat import budget_maps, needle_maps
from learnkv.evaluation.html.tables import differences, task_table
from learnkv.evaluation.html.viewer import samples
from learnkv.evaluation.panels import Row
from learnkv.evaluation.results import FULL, Record
from learnkv.formats.files import write_text

REPORT = "report.html"
MOST_BYTES = 5_900_000
"""Of a page: samples that would make it larger are left out, and it says so."""
SCRIPTS = ("page.js", "table.js", "charts.js", "tokens.js", "viewer.js")


class Contents(NamedTuple):
    """What a page is about."""

    title: str
    model: str
    environment: Mapping[str, str]
    records: Sequence[Record]
    rows: Sequence[Row] = ()
    """Of `results.json`; none: a page of samples alone."""
    scored: bool = True
    """Whether there were correct answers to score by."""
    notes: Sequence[str] = ()
    command: str = ""
    config: str = ""
    """The complete configuration as YAML."""


def write_page(path: Path, contents: Contents) -> Path:
    """Write a page that needs no network and no other file, replacing an older one in one step."""
    return write_text(path, page(contents))


def page(contents: Contents) -> str:
    """The page as text, of at most `MOST_BYTES` unless the tables alone take more."""
    data = page_data(contents)
    shown = data.pop("samples")
    left = MOST_BYTES - len(_rendered({**data, "samples": []}).encode())
    kept: list[dict[str, Any]] = []
    for sample in shown:
        left -= len(_json(sample).encode())
        if left < 0:
            break
        kept.append(sample)
    if len(kept) < len(shown):
        limit = f"the page would have more than {MOST_BYTES / 1e6:g} MB"
        data["notes"] = [*data["notes"], f"{len(shown) - len(kept)} of {len(shown)} samples are left out: {limit}."]
    return _rendered({**data, "samples": kept})


def page_data(contents: Contents) -> dict[str, Any]:
    """Everything that the page shows, as plain containers."""
    rows, records = contents.rows, contents.records
    compared = records if rows else []
    return {
        "title": contents.title,
        "model": contents.model,
        "foreground": FOREGROUND,
        "full": FULL,
        "charts": pareto_charts(rows),
        "table": task_table(rows),
        "needles": needle_maps(compared),
        "budgets": budget_maps(records),
        "differences": differences(compared),
        "samples": samples(records, contents.scored),
        "environment": dict(contents.environment),
        "notes": list(contents.notes),
        "command": contents.command,
        "config": contents.config,
    }


def _rendered(data: Mapping[str, Any]) -> str:
    parts = {"style": _text("page.css"), "scripts": list(map(_text, SCRIPTS)), "plotly": _plotly()}
    return _template().render(data=_json(data), title=data["title"], **parts)


@functools.cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return environment.from_string(_text("page.html.j2"))


@functools.cache
def _text(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> str:
    """Plotly's program as base64 of its deflated text: a third of its size, and browsers inflate it in moments."""
    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 6)).decode("ascii")


def _json(data: Any) -> str:
    """JSON that stays within a script element, whatever the texts contain; a number that is none raises ValueError."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
