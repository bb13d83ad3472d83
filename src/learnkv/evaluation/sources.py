"""Digests of source text: samples that other code measured are unknown."""

import ast
import functools
import hashlib
import inspect
import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.util import resolve_name
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

PACKAGE = "learnkv"
ROOMS = ("cache", "codecs", "core", "inference", "ops", "policy", "precision")
"""Rooms whose files every sample depends on."""
METHODS = ("allocators", "formats", "pages", "scorers")
"""Rooms of which a sample depends on the files that its policy imports."""
_LIBRARIES = tuple({Path(sysconfig.get_path(kind)) for kind in ("purelib", "platlib", "stdlib", "platstdlib")})


def source_digest(*classes: type) -> str:
    """SHA-256 of the source text of classes, their bases, and the modules beside them that they import."""
    bases = {base for cls in classes for base in cls.__mro__ if base.__module__ not in sys.stdlib_module_names}
    own = sorted((base for base in bases if not base.__module__.startswith("torch.")), key=_name)
    texts = {name: text for cls in own for name, text in _module_texts(cls.__module__).items()}
    parts: list[Any] = [
        *sorted(texts.items()),
        *(part for cls in own if _is_method(cls.__module__) for part in _replaced(cls)),
    ]
    return hashlib.sha256(json.dumps([[_name(cls) for cls in classes], parts]).encode()).hexdigest()


@functools.cache
def rooms_digest() -> str:
    """SHA-256 of the package's files in `ROOMS`."""
    root = Path(sys.modules[PACKAGE].__path__[0])
    digest = hashlib.sha256()
    for file in sorted(file for room in ROOMS for file in (root / room).rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\n{_text(file)}".encode())
    return digest.hexdigest()


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _module_texts(name: str) -> dict[str, str]:
    """Text of a module and of the modules that it imports, those of libraries and of `ROOMS` left out."""
    texts: dict[str, str] = {}
    pending = [name]
    while pending:
        current = pending.pop()
        file = getattr(sys.modules.get(current), "__file__", None)
        if current in texts or not file or not file.endswith(".py") or _is_covered(current):
            continue
        texts[current] = _text(Path(file))
        pending += [imported for imported in _imports(sys.modules[current], texts[current]) if _is_own(imported, name)]
    return texts


def _room(module: str) -> str | None:
    """The room of a module of this package; None for another package's."""
    package, *rest = module.split(".")
    return (rest[0] if rest else "") if package == PACKAGE else None


def _is_covered(module: str) -> bool:
    return _room(module) in ROOMS


def _is_method(module: str) -> bool:
    """Whether a module has the code of a method, this package's or the user's."""
    return _room(module) in (None, *METHODS)


def _is_own(module: str, importer: str) -> bool:
    """Whether a module belongs to the code of a method rather than to a library."""
    if _room(module) is not None:
        return _is_method(module)
    file = getattr(sys.modules.get(module), "__file__", None)
    beside = module.split(".")[0] == importer.split(".")[0]
    return beside or (file is not None and not any(Path(file).is_relative_to(folder) for folder in _LIBRARIES))


def _imports(module: ModuleType, text: str) -> Iterator[str]:
    """Names of the loaded modules that a module imports, within functions too."""
    package = module.__package__ or ""
    for node in ast.walk(ast.parse(text)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            target = "." * node.level + (node.module or "")
            base = resolve_name(target, package) if node.level and package else target
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in sys.modules)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _replaced(cls: type) -> Iterator[str]:
    """Source of methods that are not in the file of their class: typed in a session, or replaced at run time."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    for name, value in sorted(vars(cls).items()):
        function = inspect.unwrap(getattr(value, "__func__", getattr(value, "fget", value)) or value)
        if isinstance(function, FunctionType) and function.__code__.co_filename != file:
            yield f"{_name(cls)}.{name} {_function_text(function)}"


def _function_text(function: Callable[..., Any]) -> str:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return code_text(function.__code__)


def code_text(code: CodeType) -> str:
    """Instructions, names and constants of compiled code, the same in every process."""
    return f"{code.co_code.hex()} {code.co_names} {[_constant_text(value) for value in code.co_consts]}"


def _constant_text(value: Any) -> str:
    if isinstance(value, CodeType):
        return code_text(value)
    return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
