"""The house's import direction, its rules about third-party imports, and its limit on file length."""

import ast
import functools
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "learnkv"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

# From the ground up: a file may import from its own layer and from those before it.
LAYERS = [
    {"errors"},
    {"adapters", "component", "formats", "observation", "ops"},
    {"scorers", "allocators", "pages"},
    {"segments", "recorder", "reading", "renewal", "reopening", "layer", "compaction", "cache"},
    {"spending", "plan", "recompression", "paging", "policy", "heuristic", "probing", "attention", "program"}
    | {"decoding", "graph", "layerwise", "steps", "generation"},
    {"config", "hub", "card", "io", "models", "size"},
    {"data"},
    {"calibration", "training", "evaluation"},
    {"train", "memory", "eval", "export", "head_scores", "tables", "integrations", "reference"},
    {"study"},
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}
STRANGERS = [  # on one layer, yet never each other
    {"scorers", "allocators", "pages"},
    {"calibration", "training", "evaluation"},
]
PRIVATE = {"segments": {"reading", "layer", "compaction", "cache"}}  # how a cache is laid out is its own affair
LIBRARY_TOP = HEIGHT["models"]  # `import learnkv` gives what a program needs, not training or evaluation

TRANSFORMERS = ["layer.py", "cache.py", "attention.py", "decoding.py", "generation.py", "probing.py", "models.py"]
TRANSFORMERS += ["reference/*", "integrations/*"]
LIGHTNING = ["training/*", "evaluation/report.py", "train.py", "eval.py", "export.py", "reference/*"]
ALLOWED_IN = {
    "transformers": TRANSFORMERS,
    "lightning": LIGHTNING,
    "pytorch_lightning": [],  # the older name of the same library
    "wandb": LIGHTNING,
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
    """The part of the house a module lies in, from ``learnkv.cache.CompressedCache`` or ``ops/select/triton.py``."""
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
        yield f"{file}: `{here}` has no layer; give it one in LAYERS"
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
        if here not in PRIVATE.get(there, {here}) | {there}:
            yield f"{file}:{line}: {there} is private to {', '.join(sorted(PRIVATE[there]))}"
        if fnmatch(module, "learnkv.ops.*.triton*") and not lazy:
            yield f"{file}:{line}: a kernel is imported when it is called, inside the function"
        if fnmatch(file, "ops/*/triton.py") and "reference" in module.split("."):
            yield f"{file}:{line}: a kernel never imports the reference it is judged by"


@pytest.mark.parametrize("file", FILES)
def test_imports_run_down_only(file):
    assert not list(faults(file, imports_of(file)))


@pytest.mark.parametrize("file", ["train.py", "eval.py"])
def test_entry_points_at_the_root_are_thin(file):
    source = (ROOT / file).read_text(encoding="utf-8")
    assert len(source.splitlines()) < 40
    assert {part(found.module) for found in imports(source, file)} == {part(file)}


@pytest.mark.parametrize(
    ("file", "source", "word"),
    [
        ("cache.py", "from learnkv.policy import Policy", "above"),
        ("cache.py", "def f():\n    from .training.module import Distillation", "above"),
        ("cache.py", "if True:\n    import learnkv.data.text", "above"),
        ("scorers/snapkv.py", "from ..allocators import base", "never import each other"),
        ("training/module.py", "from learnkv import evaluation", "never import each other"),
        ("ops/select/reference.py", "from ...observation import Observation\nfrom ...cache import x", "above"),
        ("policy.py", "from learnkv.segments import Segment", "private"),
        ("policy.py", "from learnkv import attach", "face"),
        ("__init__.py", "from .training import module", "above"),
        ("brandnew.py", "", "no layer"),
        ("policy.py", "import transformers", "transformers may"),
        ("data/text.py", "def f():\n    from transformers import AutoTokenizer", "transformers may"),
        ("policy.py", "import lightning.pytorch as pl", "lightning may"),
        ("evaluation/runner.py", "import wandb", "wandb may"),
        ("training/module.py", "import pytorch_lightning", "no file"),
        ("ops/select/__init__.py", "import triton", "triton may"),
        ("ops/select/__init__.py", "from .triton import select", "when it is called"),
        ("ops/select/triton.py", "from .reference import select", "never imports the reference"),
        ("ops/select/triton.py", "from . import reference", "never imports the reference"),
    ],
)
def test_each_rule_finds_its_breach(file, source, word):
    found = list(faults(file, tuple(imports(source, file))))
    assert len(found) == 1
    assert word in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("policy.py", "from learnkv.scorers.base import Scorer\nfrom .ops import select\nimport torch"),
        ("ops/select/__init__.py", "def f():\n    from .triton import select"),
        ("ops/select/triton.py", "import triton.language as tl\nfrom ...errors import ConfigError"),
        ("evaluation/report.py", "import wandb"),
        ("__init__.py", "from learnkv.io import load_policy\nfrom .attention import attach"),
        ("train.py", "from learnkv.training.module import Distillation\nfrom learnkv.evaluation import report"),
    ],
)
def test_what_the_house_allows_is_no_breach(file, source):
    assert not list(faults(file, tuple(imports(source, file))))


def test_the_library_needs_little():
    """What a machine for measurements may lack (a parser for command lines, Lightning, data sets) is not imported."""
    assert needed_by("__init__.py") == {"numpy", "torch", "transformers", "safetensors", "yaml"}
    assert "lightning" in needed_by("train.py")


MEASURING = [
    *(ROOT / "benchmarks").rglob("*.py"),
    *(ROOT / "tests" / "gpu").rglob("*.py"),
    ROOT / "tests" / "kernels.py",
]


def test_measuring_needs_little():
    """A machine with a GPU has torch, triton, transformers, numpy and pytest; other things are done elsewhere."""
    allowed = {"torch", "triton", "transformers", "numpy", "pytest", "learnkv", "benchmarks", "kernels"}
    elsewhere = {
        "report.py": {"matplotlib"},
        "answers_kept.py": {"yaml"},
        "kvpress_adakv.py": {"kvpress"},
        "kvpress.py": {"kvpress"},
        "cpu_gates.py": {"kvpress"},
    }
    assert len(MEASURING) > 15
    for path in MEASURING:
        found = {one.module.split(".")[0] for one in imports(path.read_text(encoding="utf-8"), path.name)}
        needed = found - sys.stdlib_module_names - allowed - elsewhere.get(path.name, set())
        assert not needed, f"{path}: {', '.join(sorted(needed))}"


def test_no_file_over_300_lines_but_kernels():
    ours = [ROOT / "train.py", ROOT / "eval.py", *MEASURING, *PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    kernels = set(PACKAGE.glob("ops/*/triton.py"))
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in ours}
    assert len(lengths) > 20
    assert not {name: n for name, n in lengths.items() if n > 300 and ROOT / name not in kernels}
