"""Figures of the structure, as `make house` prints them and tests/test_house.py checks them.

python -m tools.house [--root FOLDER]      FOLDER: another checkout, to compare with
"""

import argparse
import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from tools.banned_names import BANNED, MODEL_READS, PRIVATE_WORDS, VAGUE

ROOT = Path(__file__).resolve().parents[1]
LONGEST_FILE = 300
LONGEST_FUNCTION = 60
LONGEST_MEDIAN = 7
PACKAGES = ("src/learnkv", "experiments", "benchmarks", "tools", "examples", "tests")
"""Folders whose names are checked."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Source:
    """A Python file of the package or of the experiments."""

    path: Path
    name: str
    """Its path below its package."""
    package: str

    @property
    def is_kernel(self) -> bool:
        """Whether it holds Triton kernels, whose length is not ours to choose."""
        return self.path.name == "triton.py"

    @property
    def room(self) -> str:
        """The first folder of its path, or the name of a file at the top."""
        return self.name.partition("/")[0].removesuffix(".py")

    @property
    def text(self) -> str:
        """Its text."""
        return self.path.read_text(encoding="utf-8")


def sources(root: Path, packages: tuple[str, ...] = ("src/learnkv",)) -> list[Source]:
    """All Python files of these packages, in the order of their paths."""
    return [
        Source(path, path.relative_to(root / package).as_posix(), package.rpartition("/")[2])
        for package in packages
        for path in sorted((root / package).rglob("*.py"))
    ]


def cycle(files: list[Source]) -> list[str]:
    """A circle of files that import each other, empty where there is none; lazy and type-checking imports count."""
    modules = {_module(file): file for file in files}
    arrows = {
        name: {target for target in _imports(file, name, modules) if target != name} for name, file in modules.items()
    }
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def _module(file: Source) -> str:
    parts = [file.package, *file.name.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(file: Source, name: str, modules: dict[str, Source]) -> Iterator[str]:
    package = name.split(".") if file.path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.text)):
        targets: list[str] = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1], node.module or ""] if node.level else [node.module or ""]
            targets = [".".join(filter(None, [*base, alias.name])) for alias in node.names]
        for target in targets:
            while target and target not in modules:
                target = target.rpartition(".")[0]
            if target:
                yield target


def long_files(files: list[Source]) -> list[str]:
    """Files that are too long, kernels excepted."""
    lengths = {file.name: len(file.text.splitlines()) for file in files if not file.is_kernel}
    return [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > LONGEST_FILE]


def functions(files: list[Source]) -> list[tuple[str, int]]:
    """Every function with its lines, from `def` to its last line, docstring included."""
    return [
        (f"{file.name}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for file in files
        for node in ast.walk(ast.parse(file.text))
        if isinstance(node, _FUNCTIONS)
    ]


def long_functions(files: list[Source]) -> list[str]:
    """Functions that are too long, kernels excepted."""
    measured = functions([file for file in files if not file.is_kernel])
    return [f"{name}: {lines} lines" for name, lines in measured if lines > LONGEST_FUNCTION]


def median_function(files: list[Source]) -> float:
    """Median lines of all functions."""
    return median(lines for _, lines in functions(files))


def names_of(file: Source) -> Iterator[tuple[str, str, int]]:
    """Kind, name and line of everything that the table of names covers."""
    yield "module", file.path.stem, 1
    yield from (("module", folder, 1) for folder in file.name.split("/")[:-1])
    yield from names_in(file.text)


def names_in(source: str) -> Iterator[tuple[str, str, int]]:
    """The same of a source text: classes, public functions, parameters of functions, fields and class attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, _FUNCTIONS):
            if not node.name.startswith("_"):
                yield "function", node.name, node.lineno
            arguments = node.args
            listed = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            yield from (("parameter", argument.arg, argument.lineno) for argument in listed if argument)
        elif isinstance(node, ast.ClassDef):
            yield "class", node.name, node.lineno
            for statement in node.body:
                targets = (
                    statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
                )
                yield from (("attribute", t.id, t.lineno) for t in targets if isinstance(t, ast.Name))


def keys_of(text: str) -> Iterator[tuple[str, str, int]]:
    """Kind, name and 0 for every key of a YAML."""

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            yield from map(str, node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from walk(child)

    return (("key", name, 0) for name in walk(yaml.safe_load(text)))


def banned_names(where: str, room: str, names: Iterator[tuple[str, str, int]]) -> list[str]:
    """Names of a file that the table of names replaced."""
    bans = [ban for ban in BANNED if not ban.rooms or room in ban.rooms]
    return [
        f"{where}:{line}: {kind} {name}; use {ban.use}"
        for kind, name, line in names
        for ban in bans
        if name.lower() == ban.name and kind in ban.kinds
    ]


def vague_names(name: str, source: str) -> list[str]:
    """Functions, arguments, variables and attributes of a source text whose name says nothing."""
    faults: list[str] = []
    for node in ast.walk(ast.parse(source)):
        stored = isinstance(getattr(node, "ctx", ast.Store()), ast.Store)
        bound = next((getattr(node, key) for key in ("id", "attr", "arg", "name") if hasattr(node, key)), None)
        if stored and bound in VAGUE and not isinstance(node, ast.keyword | ast.alias):
            faults.append(f"{name}:{getattr(node, 'lineno', 0)}: {bound}")
    return faults


def private_words(name: str, text: str) -> list[str]:
    """Lines with words that are nowhere to be found, in identifiers, prose and messages."""
    lines = _without_strings(text) if name in MODEL_READS else text.splitlines()
    return [
        f"{name}:{number}: {match[0]}"
        for number, line in enumerate(lines, 1)
        for match in re.finditer(PRIVATE_WORDS, re.sub(r"(?<=[a-z])(?=[A-Z])", "_", line), re.IGNORECASE)
    ]


def _without_strings(text: str) -> list[str]:
    """The lines of a source with every string blank that is no docstring."""
    nodes = list(ast.walk(ast.parse(text)))
    prose = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    lines = [line.encode() for line in text.splitlines()]  # columns are bytes
    for node in nodes:
        if id(node) in prose:
            continue
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
            for row in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                first = node.col_offset if row == node.lineno else 0
                last = (node.end_col_offset or first) if row == node.end_lineno else len(lines[row - 1])
                line = lines[row - 1]
                lines[row - 1] = line[:first] + b" " * (last - first) + line[last:]
    return [line.decode() for line in lines]


def replaced_names(root: Path) -> list[str]:
    """Banned names in all Python files and the YAML files."""
    faults: list[str] = []
    for file in sources(root, PACKAGES):
        faults += banned_names(f"{file.package}/{file.name}", file.room, names_of(file))
    for path in _yaml_files(root):
        faults += banned_names(path.relative_to(root).as_posix(), "configs", keys_of(path.read_text(encoding="utf-8")))
    return faults


def words(root: Path) -> list[str]:
    """Private words in the package: Python, YAML and Markdown."""
    package = root / "src" / "learnkv"
    paths = [path for pattern in ("*.py", "*.yaml", "*.md") for path in sorted(package.rglob(pattern))]
    return [
        fault
        for path in paths
        for fault in private_words(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
    ]


def _yaml_files(root: Path) -> list[Path]:
    return sorted([*(root / "configs").rglob("*.yaml"), *(root / "src").rglob("*.yaml")])


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "circles of imports": lambda root: cycle(sources(root)),
    f"files above {LONGEST_FILE} lines, kernels excepted": lambda root: long_files(sources(root)),
    f"functions above {LONGEST_FUNCTION} lines, kernels excepted": lambda root: long_functions(sources(root)),
    "replaced names": replaced_names,
    "vague names": lambda root: [fault for file in sources(root) for fault in vague_names(file.name, file.text)],
    "private words": words,
}


def main() -> int:
    """Print all figures; gives 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT)
    root = parser.parse_args().root.resolve()
    files = sources(root)
    print(f"{len(files)} files, {len(functions(files))} functions, median {median_function(files):g} lines")
    failed = median_function(files) > LONGEST_MEDIAN
    for title, check in CHECKS.items():
        faults = check(root)
        failed = failed or bool(faults)
        print(f"{title}: {len(faults) or 'none'}")
        print("".join(f"  {fault}\n" for fault in faults), end="")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
