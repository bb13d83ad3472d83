"""The page of all methods, made from the YAML files of `configs/policies` and from the classes that these name."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from learnkv import allocators, codecs, load_policy, pages, precision, residuals, scorers
from learnkv.core.component import Component, Status
from learnkv.persistence.methods import KINDS, components, kinds_of, status_of
from learnkv.policy.policy import Policy

ROOT = Path(__file__).resolve().parents[1]
PARTS: dict[str, tuple[ModuleType, str]] = {
    "scorer": (scorers, "Scorers: how important is an entry"),
    "allocator": (allocators, "Allocators: how the budget is split over layers and heads"),
    "pages": (pages, "Page selectors: what a decode step reads"),
    "residual": (residuals, "Residual stores: what is remembered of evicted entries"),
    "precision": (precision, "Precisions: in how many bits kept entries are stored"),
    "codec": (codecs, "Codecs: how keys or values are stored"),
}
STATUS: dict[Status | None, str] = {
    "numbers": "original's numbers",
    "port": "numbers of a port",
    "description": "description",
    "abstract": "abstract",
    None: "–",
}
DEFAULT_ALLOCATOR = type(Policy(None).allocator)
ABSTRACT = ("Scorer", "Allocator", "PageSelector", "EntrySelector", "ResidualStore", "Codec", "Precision")
READS = {  # attributes of an observation
    "keys": "keys",
    "window_attention": "keys",
    "values": "values",
    "projection": "output projection",
    "hidden": "hidden states",
    "rope": "rotations",
    "kept": "the budget",
}
SHOWN_KINDS = [kind for kind in KINDS if kind != "observation_window"]  # the last column has the window
HEAD = """---
hide: [navigation]
---

# Methods

Every row is a file in `configs/policies/`: `load_policy("snapkv")` in Python, `--ckpt snapkv` on the command line.
All of them run through the same code: a **scorer** ranks the entries of every head, an **allocator** splits the budget
over layers and heads, one function makes it exact, and the first 4 and last 8 tokens of a prompt are kept in any case.
A **page selector** evicts nothing and chooses what each decode step reads. Trained policies are made of
`LearnedScorer`, `HiddenScorer`, `GateScorer` and `LearnedAllocator`, which are listed below too.

A method's **kind** follows from its classes, and is a word for `baselines=` (`baselines=all,-trained`):
`trained` by gradient descent (all others are training-free), `calibrated` reads a
[file measured of the model](howto/own_model.md#tables), `extra_passes` reads the prompt again, `online` evicts while
tokens are generated, `pages` evicts nothing and reads chosen pages, `residual` remembers moments of what it evicts.

A method's **status** says what it was made from. `original's numbers`: the published code, whose numbers lie in
`tests/golden` and are compared with in every test run. `numbers of a port`: the same of somebody else's code, where the
authors' is not public. `description` or `abstract`: there is no code, or it was only read; the class says what was read
into it. A method has the least sure status of its parts.

This page is generated from the classes when the site is built. How the methods compare:
[method comparison](results/method_comparison.md).

"""
ABSENT = {
    "ProxyKV, arXiv 2605.16360": "a second, smaller model of the family reads every prompt, and a mapper is trained "
    "for each pair of models",
    "SOL, arXiv 2605.10875": "trains the model, whose MLPs and bits it prunes beside the cache; an abstract only",
    "SP-KV, Neural Garbage Collection as published": "train the model; `train.py config=spkv` and "
    "`config=policy_gradient` train such a gate and by such a gradient for a frozen one",
    "IndexMem's latent memory": "a trained map of what a whole layer evicts; residual stores here are those of single "
    "heads, without training",
    "RetroInfer, IceCache, AB-Sparse": "indices that find entries of an offloaded cache faster; `momentkv_means` has "
    "RetroInfer's estimate with one cluster per head",
    "SPEED, arXiv 2605.06105": "upper layers do not read the prompt, which changes how the model is run",
}
"""Published systems that are not here, and why."""


def page() -> str:
    """The Markdown of the page."""
    files = sorted((ROOT / "configs" / "policies").glob("*.yaml"))
    rows = [_row(file) for file in files]
    table = _table(["name, paper", "kind", "status", "what it keeps", "parts and options", "reads of a prompt"], rows)
    sections = [f'<div class="methods" markdown>\n\n{table}\n</div>\n']
    for part, (module, title) in PARTS.items():
        names = sorted(filter(partial(_is_method, module), module.__all__), key=str.lower)
        sections += [f"## {title}\n", *(_section(part, getattr(module, name)) for name in names)]
    absent = _table(["what", "why"], [[_prose(what), _prose(why)] for what, why in ABSENT.items()])
    return HEAD + "\n".join([*sections, f"## Published, and not here\n\n{absent}"])


def _is_method(module: ModuleType, name: str) -> bool:
    """Whether a public name of a room is a class that a policy's file may name."""
    kind = getattr(module, name)
    return name not in ABSTRACT and issubclass(kind, Component) and not inspect.isabstract(kind)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(file: Path) -> list[str]:
    """One method: name and papers, kinds, status, the first sentence of its file, parts, what it reads of a prompt."""
    text = file.read_text(encoding="utf-8")
    spec, policy = yaml.safe_load(text), load_policy(str(file))
    comment = " ".join(line.lstrip("# ") for line in text.splitlines() if line[:1] == "#")
    parts = [(part, getattr(policy, part)) for part in PARTS if isinstance(spec.get(part), dict)]
    if policy.decode is not None:
        parts.insert(1, ("scorer", policy.decode))
    stored = [part for part in components(policy) if isinstance(part, codecs.Codec) and part.status]
    parts += [("codec", part) for part in {type(part): part for part in stored}.values()]
    own = [_doc(part) for _, part in parts if type(part) is not DEFAULT_ALLOCATOR]
    papers = dict.fromkeys(paper for source in [comment, *own] for paper in _papers(source)[:1])
    links = [_link(name, type(part)) for name, part in parts]
    kinds = kinds_of(policy)
    words = [f"`{kind}`" for kind in SHOWN_KINDS if kind in kinds]
    reads = dict.fromkeys(reads_of(policy))
    summary = comment.partition(". ")[0].rstrip(".") + "."
    name = "<br>".join([f"`{file.stem}`", *papers])
    status = STATUS[status_of(policy)]
    return [name, ", ".join(words) or "–", status, _prose(summary), " · ".join(links), ", ".join(reads) or "–"]


def reads_of(policy: Policy) -> Iterator[str]:
    """What a policy reads of a prompt, in words."""
    recorded = policy.capture_spec
    if recorded.window:
        yield f"last {recorded.window} queries" if recorded.window > 1 else "last query"
    if recorded.statistics:
        yield "all queries or tokens as they are read"
    if recorded.extra_passes:
        yield "**the prompt a second time**"
    for component in (policy.scorer, policy.pages):
        for part in component.modules() if component is not None else ():
            if isinstance(part, Component):
                kind: type = type(part)
                yield from reads_of_class(kind)


@cache
def reads_of_class(kind: type) -> tuple[str, ...]:
    """Attributes of an observation that the methods of a class use, in words."""
    own = [one for one in kind.__mro__ if one.__module__.startswith("learnkv.") and one.__name__ not in ABSTRACT]
    trees = [ast.parse(textwrap.dedent(inspect.getsource(one))) for one in own]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    used = {node.attr for node in nodes if isinstance(node.value, ast.Name) and node.value.id == "obs"}
    return tuple(dict.fromkeys(word for attribute, word in READS.items() if attribute in used))


def _section(part: str, kind: type) -> str:
    """A class: what it is, where originals differ, what it reads, its options."""
    summary, *rest = _doc(kind).split("\n\n")
    prose = [block for block in rest if not block.startswith(("Args:", "Returns:", "Raises:"))]
    reads = reads_of_class(kind) if part == "scorer" else ()
    known: Status | None = getattr(kind, "status", None)
    status = f" Status: {STATUS[known]}." if known else ""
    lines = [f"### {kind.__name__} {{ #{_anchor(part, kind)} }}\n", _prose(summary) + status, ""]
    lines += [f"{_prose(block)}\n" for block in prose]
    if reads:
        lines += [f"Reads: {', '.join(reads)}.\n"]
    return "\n".join(lines) + "\n" + _options(kind)


def _options(kind: type) -> str:
    """Table of the constructor's arguments with their defaults."""
    about = _arguments(_doc(kind))
    given = [one for one in inspect.signature(kind).parameters.values() if one.kind is one.POSITIONAL_OR_KEYWORD]
    rows = [[f"`{one.name}`", _default(one), _prose(about.get(one.name, ""))] for one in given]
    return _table(["option", "default", "meaning"], rows) + "\n" if rows else ""


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return "required"
    return f"`{'null' if parameter.default is None else parameter.default}`"


def _arguments(doc: str) -> dict[str, str]:
    """Names and descriptions of a docstring's `Args:`."""
    block = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)*)", doc, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w+): ((?:.|\n {8})*)", block[1], re.MULTILINE) if block else []
    return {name: " ".join(text.split()) for name, text in entries}


def _doc(component: Any) -> str:
    return inspect.getdoc(component if inspect.isclass(component) else type(component)) or ""


def _papers(text: str) -> list[str]:
    on_arxiv = [f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(r"arXiv (\d{4}\.\d{5})", text)]
    elsewhere = re.findall(r"https://openreview\.net/forum\?id=(\w+)", text)
    return on_arxiv + [f"[OpenReview](https://openreview.net/forum?id={number})" for number in elsewhere]


def _anchor(part: str, kind: type) -> str:
    return f"{part}-{kind.__name__.lower()}"


def _link(part: str, kind: type) -> str:
    return f"[{kind.__name__}](#{_anchor(part, kind)})"


def _prose(text: str) -> str:
    """Plain text as Markdown: what is no code between backticks means itself, papers become links."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()))
    escaped = [piece if piece.startswith("`") else re.sub(r"([\\*_<>\[\]])", r"\\\1", piece) for piece in pieces]
    joined = "".join(escaped).replace("|", "\\|")
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", joined)
