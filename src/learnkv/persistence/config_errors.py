"""Messages of jsonargparse about a config, in one line that names the key and what was expected."""

import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any

from learnkv.persistence.named_configs import nearest

Words = dict[str, list[str]]
"""Keys of a command line and their values, as typed."""


def explain(message: str, typed: Words, keys: Sequence[str]) -> str:
    """One line from jsonargparse's message: the key as typed, what was expected, what came."""
    path = list(dict.fromkeys(re.findall(r'Parser key "([\w.]+)"', message)))
    unknown = re.search(r"unrecognized arguments: --([^\s=]+)|[Oo]ption '([^']+)'(?: is not accepted|$)", message)
    if unknown:
        path.append(unknown[1] or unknown[2].partition(".init_args.")[0])
    key = ".".join(path)
    shown = f"{key}={','.join(typed[key])}" if key in typed else key
    if unknown:
        return f"{shown}: unknown key{_suggestion(key, message, keys)}"
    return f"{shown}: {_problem(message)}" if key else _one_line(message)


def _problem(message: str) -> str:
    """What a value should have been."""
    if absent := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return f"{absent[1]} has no {absent[2]}{nearest(absent[2], dir(sys.modules.get(absent[1])))}"
    if missing := re.search(r"No module named '([\w.]+)'", message):
        return f"no module {missing[1]} is installed or in the current folder"
    if count := re.search(r"Expected a tuple with (\d+) elements", message):
        return f"expected {count[1]} values"
    if given := re.search(r"(?:Unexpected import path format|Expected a dot import path string): (\S+)", message):
        return f"expected the path of a class, got {given[1]}{nearest(given[1], _subclasses(message))}"
    problem = re.search(r"Expected an? (.+?)\. Got value: (.*)", message)
    if problem:
        wanted = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", problem[1])
        wanted = wanted.replace("tuple", "list")
        wanted = re.sub(r"^typing\.Literal\[(.*)\]$", r"one of \1", wanted)
        return f"expected {wanted}, got {problem[2] or 'nothing'}"
    return _one_line(message)


def _one_line(message: str) -> str:
    """A message of jsonargparse without the alternatives that do not apply."""
    noise = ("Does not validate", "Subtypes:", "Errors:", "- Expected a <class 'NoneType'>", "Given value")
    lines = [line.strip() for line in message.splitlines()]
    return " ".join(line.removeprefix("- ") for line in lines if line and not line.startswith(noise))


def _subclasses(message: str) -> list[str]:
    """Names of the classes below the first one that jsonargparse's message names."""
    named = re.search(r"<class '([\w.]+)\.(\w+)'>", message)
    bases: list[Any] = [getattr(sys.modules.get(named[1]), named[2], None)] if named else []
    for base in bases:
        bases += [cls for cls in base.__subclasses__() if cls not in bases] if inspect.isclass(base) else []
    return [cls.__name__ for cls in bases[1:]]


def _suggestion(key: str, message: str, keys: Sequence[str]) -> str:
    """The nearest key of the schema, or the nearest argument of the component that the key is below."""
    above, _, last = key.rpartition(".")
    if above and not any(name.startswith(f"{above}.") for name in keys) and (arguments := _arguments(message)):
        return nearest(last, arguments)
    component = [name for name in keys if name.endswith(f".init_args.{key.partition('.')[0]}")]
    return f"; did you mean {component[0]}?" if component else nearest(key, keys)


def _arguments(message: str) -> list[str]:
    """Constructor arguments of the last class that jsonargparse's message names."""
    named = re.findall(r"given class_path '([\w.]+)\.(\w+)'", message)
    cls = getattr(sys.modules.get(named[-1][0]), named[-1][1], None) if named else None
    return list(inspect.signature(cls).parameters) if inspect.isclass(cls) else []
