"""Which classes a policy's file may name: building one imports its module."""

import inspect
import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_type_hints

from torch import nn

from learnkv.errors import UserError
from learnkv.policy.policy import Policy


def check_classes(spec: Any, allowed: Sequence[str], where: str) -> None:
    """Raise UserError for a class that is not below one of the modules in `allowed`, before anything is imported.

    A component is a mapping with `class_path`, or the path alone.
    """
    for path in _class_paths(spec, Policy):
        if not any(path.startswith(prefix + ".") or path == prefix for prefix in allowed):
            raise UserError(
                f"{where}: names the class {path}; only learnkv's own are built unless allow={path.split('.')[0]}"
            )


def _class_paths(node: Any, owner: Any) -> Iterator[str]:
    """Paths of classes in the arguments of `owner`, from the outside in."""
    if isinstance(node, Mapping):
        if node.get("class_path") is not None:
            yield str(node["class_path"])
            owner = _class_of(str(node["class_path"]))
        components = _component_arguments(owner)
        for key, value in node.items():
            if key in components and isinstance(value, str):
                yield from [value] if "." in value else []
            elif key in components and isinstance(value, list | tuple):
                yield from (part for part in value if isinstance(part, str) and "." in part)
            yield from _class_paths(value, owner if key in ("init_args", "dict_kwargs") else None)
    elif isinstance(node, list | tuple):
        for part in node:
            yield from _class_paths(part, None)


def _class_of(path: str) -> Any:
    """A class by its path; None where there is none, which building it reports. The path was checked before."""
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None


def _component_arguments(owner: Any) -> set[str]:
    """Arguments of a class that are components."""
    if not inspect.isclass(owner):
        return set()
    return {name for name, hint in get_type_hints(owner.__init__).items() if _names_component(hint)}


def _names_component(hint: Any) -> bool:
    return (inspect.isclass(hint) and issubclass(hint, nn.Module)) or any(map(_names_component, get_args(hint)))
