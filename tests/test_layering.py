"""The house's import direction, its rules about third-party imports, and its limit on file length."""

import ast
import functools
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "learnkv"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the ground up: a room may import from its own floor and from those below it.
FLOORS = [
    {"errors"},
    {"ops", "formats"},
    {"core"},
    {"scorers", "allocators", "pages", "codecs", "residuals"},
    {"precision"},
    {"cache"},
    {"policy"},
    {"inference"},
    {"persistence"},
    {"data"},
    {"calibration"},
    {"training", "evaluation", "integrations"},
    {"cli"},
    {"__main__"},
]
HEIGHT = {room: height for height, floor in enumerate(FLOORS) for room in floor}
STRANGERS = [  # on one floor, yet never each other
    {"scorers", "allocators", "pages", "codecs", "residuals"},
    {"training", "evaluation", "integrations"},
]
PRIVATE = {"cache.storage": "cache"}  # how a cache is laid out is its own affair
LIBRARY_TOP = HEIGHT["persistence"]  # `import learnkv` gives what a program needs, not training or evaluation

TRANSFORMERS = ["cache/*", "inference/*", "integrations/*"]
LIGHTNING = ["training/*", "evaluation/report.py", "cli/*"]
ALLOWED_IN = {
    "transformers": TRANSFORMERS,
    "lightning": LIGHTNING,
    "pytorch_lightning": [],  # the older name of the same library
    "wandb": [*LIGHTNING, "evaluation/wandb_log.py"],
    "triton": ["ops/*/triton.py"],
}


class Import(NamedTuple):
    """One imported module, absolute, and whether it is imported only when a function runs."""

    module: str
    line: int
    lazy: bool


def imports(source: str, file: str) -> Iterator[Import]:
    """All imports of a file of the package, those inside functions too; ``from a import b`` counts as ``a.b``."""
    package = ["learnkv", *file.split("/")[:-1]]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(name.name, node.lineno, lazy)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                yield Import(f"{base}.{name.name}", node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(ast.parse(source), False)


def part(module: str) -> str:
    """The part a module lies in, from ``learnkv.cache.layer.CompressedLayer`` or ``ops/select/triton.py``."""
    names = module.removesuffix(".py").replace("/", ".").split(".")
    return names[1] if names[0] == "learnkv" and len(names) > 1 else names[0]


@functools.cache
def imports_of(file: str) -> tuple[Import, ...]:
    return tuple(imports((PACKAGE / file).read_text(encoding="utf-8"), file))


def needed_by(file: str) -> set[str]:
    """Third-party packages that importing a file of the package imports, through the files that it imports."""
    found: set[str] = set()
    seen: set[str] = set()
    files = [file]
    while files:
        here = files.pop()
        seen.add(here)
        for module, _, lazy in imports_of(here):
            top, *names = module.split(".")
            if lazy or top in sys.stdlib_module_names:
                continue
            if top != "learnkv":
                found.add(top)
                continue
            for end in range(len(names) + 1):  # a package comes with its __init__, a name with the file it lies in
                path = "/".join(names[:end])
                files += [f for f in (f"{path}.py", f"{path}/__init__.py".lstrip("/")) if f in FILES and f not in seen]
    return found


def faults(file: str, found: tuple[Import, ...]) -> Iterator[str]:
    """Whatever a file imports against the rules, in words."""
    here = part(file)
    height = LIBRARY_TOP if here == "__init__" else HEIGHT.get(here)
    if height is None:
        yield f"{file}: `{here}` has no floor; give it one in FLOORS"
        return
    for module, line, lazy in found:
        top = module.split(".")[0]
        if top in ALLOWED_IN and not any(fnmatch(file, pattern) for pattern in ALLOWED_IN[top]):
            yield f"{file}:{line}: {top} may be imported only in {', '.join(ALLOWED_IN[top]) or 'no file'}"
        if top != "learnkv":
            continue
        there = part(module)
        if there not in HEIGHT:
            yield f"{file}:{line}: {module} is the package's face or unknown; import from the file that defines it"
        elif HEIGHT[there] > height:
            yield f"{file}:{line}: {here} imports {there}, which lies above it"
        elif there != here and any({here, there} <= group for group in STRANGERS):
            yield f"{file}:{line}: {here} and {there} never import each other"
        for private, owner in PRIVATE.items():
            if f"{module}.".startswith(f"learnkv.{private}.") and here != owner:
                yield f"{file}:{line}: {private} is private to {owner}"
        if fnmatch(module, "learnkv.ops.*.triton*") and not lazy and not fnmatch(file, "ops/*/triton.py"):
            yield f"{file}:{line}: a kernel is imported when it is called, inside the function"
        if fnmatch(file, "ops/*/triton.py") and "reference" in module.split("."):
            yield f"{file}:{line}: a kernel never imports the reference it is judged by"


@pytest.mark.parametrize("file", FILES)
def test_imports_run_down_only(file: str) -> None:
    assert not list(faults(file, imports_of(file)))


@pytest.mark.parametrize("file", ["train.py", "eval.py"])
def test_entry_points_at_the_root_are_thin(file: str) -> None:
    source = (ROOT / file).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 40
    assert {part(found.module) for found in imports(source, file)} == {"cli", "sys"}


@pytest.mark.parametrize(
    ("file", "source", "word"),
    [
        ("cache/layer.py", "from learnkv.policy.policy import Policy", "above"),
        ("cache/layer.py", "def f():\n    from ..training.module import Distillation", "above"),
        ("cache/layer.py", "if True:\n    import learnkv.data.text", "above"),
        ("policy/planner.py", "if TYPE_CHECKING:\n    from learnkv.inference.prefill import prefill", "above"),
        ("scorers/snapkv.py", "from ..allocators import adakv", "never import each other"),
        ("training/module.py", "from learnkv import evaluation", "never import each other"),
        ("ops/select/reference.py", "from ...core.plan import Plan\nfrom ...errors import x", "above"),
        ("policy/policy.py", "from learnkv.cache.storage import Segment", "private"),
        ("policy/policy.py", "from learnkv import attach", "face"),
        ("__init__.py", "from .training import module", "above"),
        ("brandnew.py", "", "no floor"),
        ("policy/policy.py", "import transformers", "transformers may"),
        ("data/text.py", "def f():\n    from transformers import AutoTokenizer", "transformers may"),
        ("policy/policy.py", "import lightning.pytorch as pl", "lightning may"),
        ("evaluation/runner.py", "import wandb", "wandb may"),
        ("training/module.py", "import pytorch_lightning", "no file"),
        ("ops/select/__init__.py", "import triton", "triton may"),
        ("ops/select/__init__.py", "from .triton import select", "when it is called"),
        ("ops/select/triton.py", "from .reference import select", "never imports the reference"),
        ("ops/select/triton.py", "from . import reference", "never imports the reference"),
    ],
)
def test_each_rule_finds_its_breach(file: str, source: str, word: str) -> None:
    found = list(faults(file, tuple(imports(source, file))))
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("policy/policy.py", "from learnkv.core.scorer import Scorer\nfrom ..ops import select\nimport torch"),
        ("cache/layer.py", "from learnkv.cache.storage import Segment"),
        ("ops/select/__init__.py", "def f():\n    from .triton import select"),
        ("ops/select/triton.py", "import triton.language as tl\nfrom ...errors import ConfigError"),
        ("ops/select/triton.py", "from learnkv.ops.quantize.triton import load_codes"),
        ("evaluation/report.py", "import wandb"),
        (
            "__init__.py",
            "from learnkv.persistence.policies import load_policy\nfrom .inference.attention import attach",
        ),
        ("cli/main.py", "from learnkv.training.module import Distillation\nfrom learnkv.evaluation import report"),
    ],
)
def test_what_the_house_allows_is_no_breach(file: str, source: str) -> None:
    assert not list(faults(file, tuple(imports(source, file))))


def test_the_library_needs_little() -> None:
    """What a machine for measurements may lack (a parser for command lines, Lightning, data sets) is not imported."""
    assert needed_by("__init__.py") == {"numpy", "torch", "transformers", "safetensors", "yaml"}
    assert "lightning" in needed_by("training/run.py")


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of files that import each other, directly or through others (Tarjan's strongly connected components)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for there in arrows[file]:
            if there not in index:
                visit(there)
            if there in stack:
                low[file] = min(low[file], low[there])
        if low[file] == index[file]:
            group = [stack.pop()]
            while group[-1] != file:
                group.append(stack.pop())
            if len(group) > 1 or file in arrows[file]:
                groups.append(sorted(group))

    for file in arrows:
        if file not in index:
            visit(file)
    return groups


def file_of(module: str) -> str | None:
    """The file of the package that a module or a name in it lies in."""
    names = module.split(".")[1:]
    for end in range(len(names), -1, -1):
        path = "/".join(names[:end])
        for file in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if file in FILES:
                return file
    return None


def test_there_is_no_circle() -> None:
    """Files that import each other; imports for type checkers and within functions count."""
    modules = {file: [found.module for found in imports_of(file) if part(found.module) in HEIGHT] for file in FILES}
    arrows = {file: {there for name in names if (there := file_of(name))} for file, names in modules.items()}
    assert circles(arrows) == []


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "d"}, "e": {"d"}}) == [["a", "b", "c"], ["d"]]


MEASURING = [
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "tests" / "gpu").rglob("*.py"),
    ROOT / "tests" / "support" / "kernels.py",
]


def test_measuring_needs_little() -> None:
    """A machine with a GPU has torch, triton, transformers, numpy and pytest; other things are done elsewhere."""
    allowed = {"torch", "triton", "transformers", "numpy", "pytest", "learnkv", "benchmarks", "support"}
    elsewhere = {
        "report.py": {"matplotlib"},
        "answers_kept.py": {"yaml"},
        "kvpress_adakv.py": {"kvpress"},
        "kvpress_prefill.py": {"kvpress"},
        "kvpress.py": {"kvpress"},
        "cpu_gates.py": {"kvpress"},
    }
    assert len(MEASURING) > 15
    for path in MEASURING:
        found = {one.module.split(".")[0] for one in imports(path.read_text(encoding="utf-8"), path.name)}
        needed = found - sys.stdlib_module_names - allowed - elsewhere.get(path.name, set())
        assert not needed, f"{path}: {', '.join(sorted(needed))}"


def test_no_file_over_300_lines_but_kernels() -> None:
    ours = [ROOT / "train.py", ROOT / "eval.py", *MEASURING, *PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    kernels = set(PACKAGE.glob("ops/*/triton.py"))
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ours}
    assert len(lengths) > 20
    assert not {name: n for name, n in lengths.items() if n > 300 and ROOT / name not in kernels}
