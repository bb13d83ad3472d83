"""What is imported is declared where it is imported, and what is declared is imported (pyproject.toml)."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

from learnkv.cli.main import OPTIONAL

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "learnkv"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

DISTRIBUTION = {
    "yaml": "pyyaml",
    "huggingface_hub": "huggingface-hub",
    "math_verify": "math-verify",
    "lm_eval": "lm-eval",
}
"""Where the name that is imported is not the name that is installed."""
EXTRAS = {  # of a file or room; all others: the package alone
    "inference/lora.py": {"train", "eval"},  # of policies with an adapter, imported when one is loaded
    "inference/known_models.py": {"gguf"},
    "data/*": {"train", "eval"},
    "calibration/*": {"eval"},
    "training/*": {"train"},
    "evaluation/*": {"eval"},
    "integrations/kvpress.py": {"kvpress"},
    "integrations/lm_eval*.py": {"lm-eval"},
}
TOOLS = {"docs", "dev", "all"}
"""Extras of which nothing is imported by the package."""


def names(requirements: list[str]) -> set[str]:
    """The distributions that requirements name."""
    return {re.split(r"[ \[<>=;~!]", one, maxsplit=1)[0].lower() for one in requirements} - {"learnkv"}


CORE = names(PROJECT["dependencies"])
EXTRA = {extra: names(listed) for extra, listed in PROJECT["optional-dependencies"].items()}


def third_party(source: str) -> Iterator[tuple[str, int]]:
    """Distributions that a file imports, within functions too, or takes data files from; with the line."""
    for node in ast.walk(ast.parse(source)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "files" and node.args:
            modules = [one.value for one in node.args if isinstance(one, ast.Constant)]  # importlib.resources.files
        for module in modules:
            top = module.partition(".")[0]
            if top not in sys.stdlib_module_names and top != "learnkv":
                yield DISTRIBUTION.get(top, top), node.lineno


def extras_of(file: str) -> set[str]:
    return next((extras for pattern, extras in EXTRAS.items() if fnmatch(file, pattern)), set())


def undeclared(file: str, source: str) -> list[str]:
    """Imports that an installation with the extras of this file does not promise."""
    extras = extras_of(file)
    promised = CORE | (set.intersection(*(EXTRA[extra] for extra in extras)) if extras else set())
    return [f"{file}:{line}: {name} is not declared" for name, line in third_party(source) if name not in promised]


@pytest.mark.parametrize("file", FILES)
def test_what_is_imported_is_declared(file: str) -> None:
    assert not undeclared(file, (PACKAGE / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("policy/policy.py", "import lightning"),
        ("persistence/hub.py", "def f():\n    from peft import LoraConfig"),
        ("data/text.py", "import lightning"),  # train has it, eval has not
        ("evaluation/report.py", "import lightning.pytorch"),
        ("data/words.py", "files('spacy')"),
    ],
)
def test_an_undeclared_import_is_found(file: str, source: str) -> None:
    assert len(undeclared(file, source)) == 1


def test_what_is_declared_is_imported() -> None:
    imported: dict[str, set[str]] = {file: set() for file in FILES}
    for file in FILES:
        imported[file] = {name for name, _ in third_party((PACKAGE / file).read_text(encoding="utf-8"))}
    assert set().union(*imported.values()) >= CORE
    for extra, declared in EXTRA.items():
        if extra not in TOOLS:
            used = set().union(*(imported[file] for file in FILES if extra in extras_of(file)))
            assert declared <= used, f"{extra}: {', '.join(sorted(declared - used))} is never imported"


def test_the_command_knows_what_the_extras_install() -> None:
    assert EXTRA["train"] | EXTRA["eval"] | EXTRA["gguf"] == {DISTRIBUTION.get(name, name) for name in OPTIONAL}


def test_tools_are_pinned() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert set().union(CORE, *(EXTRA[extra] for extra in EXTRA if extra != "kvpress")) <= pinned


def test_all_is_everything_that_fits_together() -> None:
    """kvpress needs an older transformers than the one that is tested."""
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(re.findall(r"[\w-]+", everything.partition("[")[2])) == set(EXTRA) - {"all", "kvpress"}
